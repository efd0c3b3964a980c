"""How far images and outputs in a lower precision are from float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..common.arrays import Array
from ..common.errors import DiffoundryError
from ..engines import Engine
from .losses import decibels

IDENTICAL = 120.0
"""PSNR of two equal images, in dB, where the formula gives infinity."""
_PEAK = 255.0


class QualityError(DiffoundryError):
    """A lower precision is too far from float32, or is not finite. The message holds the figures."""


def psnr(image: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one shape, in dB."""
    squared = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return IDENTICAL if squared == 0 else min(IDENTICAL, float(10 * np.log10(_PEAK**2 / squared)))


def compare(engine: Engine, calls: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> dict[str, float]:
    """The signal-to-noise ratio of each output of `engine`, in dB, the lowest over recorded `calls`.

    calls: feeds and the outputs in float32. An output that is not finite where float32 is gives -`LOSSLESS`.
    """
    lowest: dict[str, float] = {}
    for feeds, exact in calls:
        made = engine(feeds)
        for name, reference in exact.items():
            signal = float(np.sum(np.square(reference, dtype=np.float64)))
            with np.errstate(invalid="ignore", over="ignore"):
                noise = float(np.sum(np.square(reference - made[name], dtype=np.float64)))
            lowest[name] = min(lowest.get(name, np.inf), decibels(signal, noise))
    return {name: round(ratio, 1) for name, ratio in lowest.items()}
