"""Optimum's pipeline on ONNX Runtime, which reads a bundle as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from . import protocol
else:
    import protocol

_PACKAGES = ("optimum-onnx", "optimum", "onnxruntime", "torch", "diffusers", "transformers", "numpy")


class Optimum:
    """A pipeline of Optimum on the CPU, in fp32."""

    def __init__(self) -> None:
        """Import what is needed."""
        import diffusers
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTDiffusionPipeline

        self._torch, self._diffusers, self._onnxruntime = torch, diffusers, onnxruntime
        self._class = ORTDiffusionPipeline
        self._pipeline: Any = None

    def load(self, asked: protocol.Asked) -> protocol.Loaded:
        """Load the bundle."""
        self._pipeline = None
        protocol.precision_of(asked, ("fp32",))
        protocol.device_of(asked)
        options = self._onnxruntime.SessionOptions()
        if asked.get("threads"):
            options.intra_op_num_threads = asked["threads"]
            self._torch.set_num_threads(asked["threads"])
        provider = "CPUExecutionProvider"
        pipeline = self._class.from_pretrained(
            asked["bundle"], provider=provider, session_options=options, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        if asked.get("scheduler_class"):
            made = getattr(self._diffusers, asked["scheduler_class"])
            pipeline.scheduler = made.from_config(pipeline.scheduler.config, **asked.get("scheduler_options", {}))
        self._pipeline = pipeline
        return protocol.Loaded({"device": "cpu", "provider": provider, "threads": options.intra_op_num_threads})

    def draw(self, asked: protocol.Asked, latents: protocol.Array, clock: protocol.Clock) -> protocol.Array:
        """Pictures as PIL images, which is what the pipeline gives where nothing is said."""
        torch, pipeline = self._torch, self._pipeline
        generators = protocol.generators(torch, asked, latents)

        def on_step(_pipeline: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
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
            latents=torch.from_numpy(latents),
            callback_on_step_end=on_step,
        ).images
        clock.stop()
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    def peak_gpu(self) -> int | None:
        """None: it runs on the CPU."""
        return None


if __name__ == "__main__":
    protocol.serve(Optimum, _PACKAGES)
