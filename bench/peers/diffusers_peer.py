"""diffusers on PyTorch, eager or with its models compiled: `diffusers_peer.py [--compile]`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from . import protocol
else:
    import protocol

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton", "numpy")
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Diffusers:
    """A pipeline of diffusers. compiled: whether its denoiser and decoder go through `torch.compile`."""

    def __init__(self, compiled: bool) -> None:
        """Import what is needed."""
        import diffusers
        import torch
        import transformers  # noqa: F401  # diffusers imports it late; its time is one of importing

        self._compiled, self._torch, self._diffusers = compiled, torch, diffusers
        self._pipeline: Any = None
        self._device = "cpu"

    def load(self, asked: protocol.Asked) -> protocol.Loaded:
        """Load the checkpoint; `torch.compile` does its work in the first picture."""
        torch, self._pipeline = self._torch, None
        folder, precision = protocol.checkpoint_of(asked), protocol.precision_of(asked, tuple(_TYPES))
        self._device = protocol.device_of(asked, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        if asked.get("threads"):
            torch.set_num_threads(asked["threads"])
        pipeline = self._diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=getattr(torch, _TYPES[precision]), safety_checker=None, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        if asked.get("scheduler_class"):
            made = getattr(self._diffusers, asked["scheduler_class"])
            options = asked.get("scheduler_options", {})
            pipeline.scheduler = made.from_config(pipeline.scheduler.config, **options)
        pipeline.to(self._device)
        info = {"device": self._device, "attention": "sdpa", "threads": torch.get_num_threads()}
        if self._compiled:
            info |= self._compile(pipeline, str(asked["work"]))
        self._pipeline = pipeline
        return protocol.Loaded(info)

    def draw(self, asked: protocol.Asked, latents: protocol.Array, clock: protocol.Clock) -> protocol.Array:
        """Pictures as PIL images, which is what the pipeline gives where nothing is said."""
        torch, pipeline = self._torch, self._pipeline
        generators = protocol.generators(torch, asked, latents)
        start = torch.from_numpy(latents).to(self._device, pipeline.dtype)
        by_step = self._device == "cpu" or asked.get("by_step", False)

        def on_step(_pipeline: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if by_step:
                self._wait()
                clock.step()
            return tensors

        clock.start()
        images = pipeline(
            asked["prompt"],
            negative_prompt=asked.get("negative_prompt"),
            height=asked["height"],
            width=asked["width"],
            num_inference_steps=asked["steps"],
            guidance_scale=asked["guidance"],
            num_images_per_prompt=asked["count"],
            generator=generators,
            latents=start,
            callback_on_step_end=on_step,
        ).images
        self._wait()
        clock.stop()
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    def peak_gpu(self) -> int | None:
        """Bytes that PyTorch held of the GPU at most."""
        return int(self._torch.cuda.max_memory_reserved()) if self._device == "cuda" else None

    def _wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def _compile(self, pipeline: Any, work: str) -> dict[str, Any]:
        """Have the denoiser and the decoder compiled on their first call, with the weights as constants on the CPU.

        What the compiler makes is kept in `work`: later processes find it.
        """
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = work
        freezing = self._device == "cpu"
        import torch._inductor.config as inductor

        inductor.freezing = freezing
        denoiser = next((name for name in ("unet", "transformer") if hasattr(pipeline, name)), None)
        if denoiser is None or not hasattr(pipeline, "vae"):
            raise protocol.Refused(f"{type(pipeline).__name__} has no denoiser and decoder that could be compiled")
        mode = None if freezing else "max-autotune-no-cudagraphs"
        getattr(pipeline, denoiser).compile(mode=mode)
        pipeline.vae.decoder.compile(mode=mode)
        return {"compiled": f"{denoiser}, vae.decoder", "freezing": freezing}


if __name__ == "__main__":
    protocol.serve(lambda: Diffusers("--compile" in sys.argv[1:]), _PACKAGES)
