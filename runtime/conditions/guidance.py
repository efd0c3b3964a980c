"""The guidance scale as an input of the model: of distilled models, which predict once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...bundle import Manifest
from ...common.arrays import Array
from ..request import Request
from .condition import Condition, Fed, Job

_SINUSOID = "guidance.sinusoid"


class GuidanceCondition(Condition):
    """Classifier-free guidance of the loop, or the scale given to the model; see `condition.Condition`."""

    def __init__(self, manifest: Manifest) -> None:
        wiring = manifest.wiring
        self.given = any(source.startswith("guidance") for source in wiring.inputs.values())
        inputs = manifest.components[manifest.named("denoiser")].inputs
        widths = [tensor.shape[-1] for tensor in inputs if wiring.inputs.get(tensor.name) == _SINUSOID]
        self._width = int(widths[0]) if widths else 0

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Rescale and interval act where the loop guides."""
        always = frozenset({"guidance.scale", "guidance.mode", *(["guidance.true_cfg_scale"] if self.given else [])})
        return always | {"guidance.rescale", "guidance.interval"} if guided else always

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """The scale, and its embedding."""
        return [self._fed(job.given) if self.given else Fed() for job in jobs]

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
