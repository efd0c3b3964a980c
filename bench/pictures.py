"""How far one picture is from another."""

from __future__ import annotations

import math

import numpy as np

from ..common.arrays import Array


def difference(found: Array, reference: Array) -> tuple[float | None, int]:
    """The PSNR in decibels, None where they are identical, and the largest difference of a byte.

    Both uint8, of one shape.
    """
    levels = np.abs(found.astype(np.int16) - reference.astype(np.int16))
    square = float(np.mean(levels.astype(np.float64) ** 2))
    return (None if square == 0 else 10 * math.log10(255**2 / square)), int(levels.max())
