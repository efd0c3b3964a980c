"""OpenVINO GenAI's text-to-image pipeline on the CPU, on models that optimum-intel converts once.

`openvino_genai_peer.py --convert CHECKPOINT FOLDER` converts, in a process of its own: the memory of this one is then
what drawing takes.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from . import protocol
else:
    import protocol

_PACKAGES = ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "numpy")
_TYPES = {"fp32": "f32", "bf16": "bf16"}
_SCHEDULERS = {
    "EulerDiscreteScheduler": "EULER_DISCRETE",
    "EulerAncestralDiscreteScheduler": "EULER_ANCESTRAL_DISCRETE",
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PNDM",
    "LCMScheduler": "LCM",
    "FlowMatchEulerDiscreteScheduler": "FLOW_MATCH_EULER_DISCRETE",
}
_GUIDANCE = 7.5
"""Where loading is not told of one: above 1, two rows for each picture."""
_NAMES = "euler, euler_a, ddim, plms or lcm"


class OpenVinoGenAi:
    """A pipeline of OpenVINO GenAI, compiled for the size that is asked for."""

    def __init__(self) -> None:
        """Import what is needed."""
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        self._pipeline: Any = None
        self._shape: tuple[int, int, int, bool] | None = None
        self._models, self._properties = Path(), dict[str, Any]()

        class Given(openvino_genai.Generator):  # type: ignore[misc]
            """Gives the latents first, and after them what torch's generator would."""

            def __init__(self, latents: protocol.Array, seed: int) -> None:
                super().__init__()
                self._latents: protocol.Array | None = latents
                self._torch = openvino_genai.TorchGenerator(seed)

            def next(self) -> float:
                return float(self._torch.next())

            def randn_tensor(self, shape: Any) -> Any:
                drawn = self._torch.randn_tensor(shape)
                latents, self._latents = self._latents, None
                if latents is None:
                    return drawn
                return openvino.Tensor(np.ascontiguousarray(latents.reshape(tuple(shape)), np.float32))

        self._given = Given

    def load(self, asked: protocol.Asked) -> protocol.Loaded:
        """Convert the checkpoint where that was not done before, and compile its models for the size asked for."""
        self._pipeline = None
        precision, _ = protocol.precision_of(asked, tuple(_TYPES)), protocol.device_of(asked)
        capabilities = self._openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in capabilities:
            raise protocol.Refused("this processor has no bf16: choose --precision fp32")
        checkpoint, work = protocol.checkpoint_of(asked), Path(asked["work"])
        config = protocol.scheduler_config(asked, checkpoint)
        kind = _SCHEDULERS.get(str(config.get("_class_name")))
        if kind is None:
            raise protocol.Refused(f"it has no {config.get('_class_name')}: give --scheduler {_NAMES}")
        if kind == "PNDM" and not config.get("skip_prk_steps", False):
            raise protocol.Refused("it has PNDM without the Runge-Kutta steps alone: give --scheduler plms")
        models = work / "openvino"
        convert_s = _converted(checkpoint, models)
        config = {name: value for name, value in config.items() if value not in (math.inf, -math.inf)}  # no JSON of its
        (models / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
        self._properties = {"INFERENCE_PRECISION_HINT": _TYPES[precision], "PERFORMANCE_HINT": "LATENCY"}
        if asked.get("threads"):
            self._properties["INFERENCE_NUM_THREADS"] = asked["threads"]
        self._models = models
        self._compile(1, asked["height"], asked["width"], asked.get("guidance", _GUIDANCE))
        return protocol.Loaded({"device": "CPU", "scheduler": kind, **self._properties}, convert_s)

    def draw(self, asked: protocol.Asked, latents: protocol.Array, clock: protocol.Clock) -> protocol.Array:
        """Pictures, as the pipeline gives them."""

        def on_step(_index: int, _count: int, _latents: Any) -> bool:
            clock.step()
            return False

        self._compile(asked["count"], asked["height"], asked["width"], asked["guidance"])
        generator = self._given(latents, asked["seed"])
        given = {} if asked.get("negative_prompt") is None else {"negative_prompt": asked["negative_prompt"]}
        clock.start()
        images = self._pipeline.generate(
            asked["prompt"],
            **given,
            height=asked["height"],
            width=asked["width"],
            num_inference_steps=asked["steps"],
            guidance_scale=asked["guidance"],
            num_images_per_prompt=asked["count"],
            generator=generator,
            callback=on_step,
        )
        clock.stop()
        return np.array(images.data)

    def _compile(self, count: int, height: int, width: int, guidance: float) -> None:
        """Compile the models for these shapes, which is fastest, where they are not those of the pipeline."""
        shape = count, height, width, guidance > 1
        if self._pipeline is None or shape != self._shape:
            self._pipeline = None
            pipeline = self._genai.Text2ImagePipeline(self._models)
            pipeline.reshape(count, height, width, guidance)
            pipeline.compile("CPU", **self._properties)
            self._pipeline, self._shape = pipeline, shape

    def peak_gpu(self) -> int | None:
        """None: it runs on the CPU."""
        return None


def _converted(checkpoint: str, models: Path) -> float:
    """Seconds that converting the checkpoint to `models` took, 0 where it was there. Raises `Refused`."""
    if models.is_dir():
        return 0.0
    start, part = time.perf_counter(), models.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-E", "-s", __file__, "--convert", checkpoint, str(part)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise protocol.Refused(f"optimum-intel cannot convert {checkpoint}: {said[-1] if said else done.returncode}")
    part.rename(models)
    return time.perf_counter() - start


def _convert(checkpoint: str, folder: str) -> None:
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(
        checkpoint,
        Path(folder),
        task="text-to-image",
        library_name="diffusers",
        ov_config=OVConfig(dtype="fp32"),
        convert_tokenizer=True,
        local_files_only=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        _convert(sys.argv[2], sys.argv[3])
    else:
        protocol.serve(OpenVinoGenAi, _PACKAGES)
