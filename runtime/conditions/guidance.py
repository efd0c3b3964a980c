"""What the model is told of guidance: the scale, where it predicts once (distilled models), and layers to skip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...bundle import Manifest
from ...common.arrays import Array
from ...common.errors import RequestError
from ..loop.guidance import SKIPPING, Guidance
from ..request import Request
from .condition import Condition, Fed, Job

_SINUSOID, _LAYERS = "guidance.sinusoid", "layers"


class GuidanceCondition(Condition):
    """Classifier-free guidance of the loop, or the scale given to the model; see `condition.Condition`."""

    def __init__(self, manifest: Manifest) -> None:
        wiring = manifest.wiring
        self.given = any(source.startswith("guidance") for source in wiring.inputs.values())
        inputs = manifest.components[manifest.named("denoiser")].inputs
        widths = [tensor.shape[-1] for tensor in inputs if wiring.inputs.get(tensor.name) == _SINUSOID]
        self._width = int(widths[0]) if widths else 0
        layers = [(tensor.name, tensor.shape[-1]) for tensor in inputs if wiring.inputs.get(tensor.name) == _LAYERS]
        self._layers_input, count = layers[0] if layers else ("", 0)
        self.layers = int(count)

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Rescale and interval act where the loop guides."""
        always = frozenset({"guidance.scale", "guidance.mode", *(["guidance.true_cfg_scale"] if self.given else [])})
        always |= {f"guidance.{name}" for name in SKIPPING} if self.layers else frozenset()
        return always | {"guidance.rescale", "guidance.interval"} if guided else always

    def check(self, jobs: Sequence[Job]) -> None:
        """Layers that are skipped are some of the denoiser's, and the loop guides."""
        for job in jobs:
            layers = job.guidance.skip_guidance_layers
            if layers and not job.guidance.active:
                raise RequestError(
                    "skip_guidance_layers has no effect without guidance: leave it out, or set guidance above 1"
                )
            if layers and layers[-1] >= self.layers:
                raise RequestError(
                    f"skip_guidance_layers must be from 0 to {self.layers - 1} for this model, which has "
                    f"{self.layers} layers, found {layers[-1]}"
                )
            if layers:
                self._check_steps(job)

    @staticmethod
    def _check_steps(job: Job) -> None:
        guidance, count = job.guidance, job.table.steps
        start, stop = guidance.skip_layer_guidance_start, guidance.skip_layer_guidance_stop
        acts = (job.steps * start < k < job.steps * stop and guidance.at(k, count) for k in range(count))
        if not any(acts):
            raise RequestError(
                f"skip_guidance_layers has no effect: none of {count} steps is guided and lies between "
                f"skip_layer_guidance_start {start:g} and skip_layer_guidance_stop {stop:g} of them; ask for more "
                "steps, or for a larger skip_layer_guidance_stop"
            )

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """The scale, its embedding, and which layers are run."""
        fed = [self._fed(job.given) if self.given else Fed() for job in jobs]
        return [each | self._kept(job.guidance) for each, job in zip(fed, jobs, strict=True)] if self.layers else fed

    def _kept(self, guidance: Guidance) -> Fed:
        every = np.ones(self.layers, np.float32)
        some = every.copy()
        some[list(guidance.skip_guidance_layers)] = 0
        skipped = {self._layers_input: some} if guidance.skips else {}
        return Fed(inputs={self._layers_input: every}, skipped_inputs=skipped)

    def _fed(self, scale: float) -> Fed:
        made: dict[str, Array] = {"guidance": np.array(scale, np.float32)}
        if self._width:
            made[_SINUSOID] = guidance_embedding(scale, self._width)
        return Fed(made, made)


def guidance_embedding(scale: float, width: int) -> Array:
    """`timestep_cond`, float32 (width,): sines and cosines of 1000 · (scale − 1) (Luo et al. 2023, section 4.2)."""
    half = width // 2
    step = np.float32(math.log(10000.0)) / np.float32(max(half - 1, 1))
    exponents = np.arange(half, dtype=np.float32) * -step
    # float32 at each stage, as torch: a sine of some thousand radians shows every rounding
    angles = np.float32(1000 * (scale - 1)) * np.exp(exponents.astype(np.float64)).astype(np.float32)
    embedding = np.zeros(width, np.float32)
    embedding[: 2 * half] = np.concatenate([wave(angles.astype(np.float64)) for wave in (np.sin, np.cos)])
    return embedding
