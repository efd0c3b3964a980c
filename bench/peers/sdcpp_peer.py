"""stable-diffusion.cpp on the CPU, through the wheels of cyllama.

It takes no latents: its own generator, which is that of torch on the CPU, makes the same ones from the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from . import protocol
else:
    import protocol

_PACKAGES = ("cyllama", "numpy")
_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_METHODS = {
    "EulerDiscreteScheduler": "EULER",
    "EulerAncestralDiscreteScheduler": "EULER_A",
    "DPMSolverMultistepScheduler": "DPMPP2M",
}
_NAMES = "euler, euler_a or dpm++2m"
_WIDTHS = [320, 640, 1280, 1280], [320, 640, 1280]
"""Channels of the U-Nets that it knows: of Stable Diffusion 1 and 2, and of XL."""
_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}
_FILES = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")


class StableDiffusionCpp:
    """A context of stable-diffusion.cpp."""

    def __init__(self) -> None:
        """Import what is needed."""
        import cyllama.sd
        from cyllama.utils import validation

        # cyllama takes files alone, the library that it wraps a folder of diffusers too; `_check` looks into it
        validation.validate_model_file = lambda *_given, **_named: None
        cyllama.sd.set_log_callback(self._on_log)
        self._sd = cyllama.sd
        self._context: Any = None
        self._config: dict[str, Any] = {}
        self._method: Any = None
        self._said = ""

    def load(self, asked: protocol.Asked) -> protocol.Loaded:
        """Load the checkpoint. Convolutions have fp16 weights in every precision: that is how the library is made."""
        self._context = None
        precision, _ = protocol.precision_of(asked, tuple(_TYPES)), protocol.device_of(asked)
        folder = protocol.checkpoint_of(asked)
        _check(Path(folder))
        self._config = protocol.scheduler_config(asked, folder)
        self._method = getattr(self._sd.SampleMethod, _method(self._config))
        params = self._sd.SDContextParams(model_path=folder)
        params.wtype = getattr(self._sd.SDType, _TYPES[precision])
        params.rng_type = params.sampler_rng_type = self._sd.RngType.CPU
        params.vae_decode_only, params.free_params_immediately = True, False
        if asked.get("threads"):
            params.n_threads = asked["threads"]
        try:
            self._context = self._sd.SDContext(params)
        except RuntimeError as error:
            raise protocol.Refused(f"stable-diffusion.cpp cannot load {folder}: {self._said or error}") from None
        return protocol.Loaded(
            {"device": "cpu", "sampler": self._method.name.lower(), "convolutions": "fp16", **self._built()}
        )

    def draw(self, asked: protocol.Asked, latents: protocol.Array, clock: protocol.Clock) -> protocol.Array:
        """Pictures, as the library gives them."""
        sigmas = _sigmas(self._config, asked["steps"])
        params = self._sd.SDImageGenParams()
        params.prompt, params.negative_prompt = asked["prompt"], asked.get("negative_prompt") or ""
        params.width, params.height = asked["width"], asked["height"]
        params.seed, params.batch_count = asked["seed"], asked["count"]
        sample = params.sample_params
        sample.sample_method, sample.sample_steps = self._method, asked["steps"]
        sample.cfg_scale, sample.custom_sigmas = asked["guidance"], sigmas
        params.sample_params = sample

        def on_step(step: int, steps: int, _seconds: float) -> None:
            # it counts tensors that it loads or tiles too
            if steps == asked["steps"] and 0 < step <= steps:
                clock.step()

        self._sd.set_progress_callback(on_step)
        clock.start()
        images = self._context.generate_with_params(params)
        clock.stop()
        self._sd.set_progress_callback(None)
        return np.stack([np.asarray(image.to_numpy()) for image in images])

    def peak_gpu(self) -> int | None:
        """None: it runs on the CPU."""
        return None

    def _on_log(self, level: Any, text: str) -> None:
        if int(level) >= 3:
            self._said = text.strip()

    def _built(self) -> dict[str, str]:
        """What instructions the wheel was built for."""
        words = [part.split("=") for part in self._sd.get_system_info().replace("\n", " ").split("|") if "=" in part]
        return {"instructions": " ".join(name.split()[-1] for name, value in words if value.strip() == "1")}


def _check(folder: Path) -> None:
    """Raise `Refused` for what the library would not load, or would stop this process over."""
    widths = protocol.read_json(folder / "unet" / "config.json").get("block_out_channels")
    if widths not in _WIDTHS:
        raise protocol.Refused(f"it knows the U-Nets of Stable Diffusion alone, not one of {widths} channels")
    for name in (*_FILES, "text_encoder/model.safetensors"):
        if not (folder / name).is_file():
            raise protocol.Refused(f"it reads {name}, which {folder} has not")


def _method(config: dict[str, Any]) -> str:
    """The sampling method that does what the configuration says. Raises `Refused`."""
    name = str(config.get("_class_name"))
    if name not in _METHODS:
        raise protocol.Refused(f"it has no {name}: give --scheduler {_NAMES}")
    if _METHODS[name] == "DPMPP2M":
        _expect(config, **_DPM)
    _expect(config, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    _expect(config, trained_betas=None, rescale_betas_zero_snr=False, prediction_type="epsilon")
    _expect(config, use_exponential_sigmas=False, use_beta_sigmas=False, use_lu_lambdas=False, use_flow_sigmas=False)
    return _METHODS[name]


def _expect(config: dict[str, Any], **values: Any) -> None:
    for name, value in values.items():
        if config.get(name, value) != value:
            raise protocol.Refused(f"its schedulers have no {name}={config[name]}, {value} alone")


def _sigmas(config: dict[str, Any], steps: int) -> list[float]:
    """Noise levels of the steps and a last 0, those of the diffusers scheduler: "leading", "linspace" or "trailing"."""
    total, solver = 1000, config["_class_name"] == "DPMSolverMultistepScheduler"
    spacing = config.get("timestep_spacing", "linspace")
    cumulative = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, total) ** 2)
    levels = np.sqrt(1 / cumulative - 1)
    if spacing == "linspace":
        at = np.linspace(0, total - 1, steps + 1).round()[:0:-1] if solver else np.linspace(total - 1, 0, steps)
    elif spacing == "leading":
        many = steps + 1 if solver else steps
        at = (np.arange(many) * (total // many)).round()[::-1][:steps] + config.get("steps_offset", 0)
    else:
        at = np.arange(total, 0, -total / steps)[:steps].round() - 1
    found = np.interp(at, np.arange(total), levels)
    if config.get("use_karras_sigmas"):
        high, low = (levels[-1], levels[0]) if solver else (found[0], found[-1])
        ramp = np.linspace(0, 1, steps)
        found = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return [*map(float, found), 0.0]


if __name__ == "__main__":
    protocol.serve(StableDiffusionCpp, _PACKAGES)
