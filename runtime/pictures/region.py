"""Where in the drawing a picture is read: its mask at the sizes of the denoiser's cross-attentions."""

from __future__ import annotations

import math

import numpy as np

from ...common.arrays import Array

_CUBIC = -0.75
"""The coefficient of torch's bicubic interpolation."""


def mask_of_queries(mask: Array, height: int, width: int) -> Array:
    """`mask` (H, W) for the height · width queries of an attention, float32 (height, width).

    As diffusers' `IPAdapterMaskProcessor.downsample`, which guesses the two sides from their product and the mask's
    ratio, and fills up or cuts off what is then amiss.
    """
    queries = height * width
    rows = int(math.sqrt(queries / (mask.shape[1] / mask.shape[0]))) or 1
    rows += int(queries % rows != 0)
    columns = queries // rows
    if not columns:  # of a very narrow drawing the guess is none
        rows, columns = height, width
    smaller = _weights(mask.shape[0], rows) @ mask @ _weights(mask.shape[1], columns).T
    flat = np.zeros(queries, np.float32)
    flat[: smaller.size] = smaller.reshape(-1)[:queries]
    return flat.reshape(height, width)


def _weights(size: int, wanted: int) -> Array:
    """What each of `wanted` samples takes of `size`, (wanted, size): torch's `interpolate`, bicubic (Keys 1981)."""
    places = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    first = np.floor(places).astype(int)
    found = np.zeros((wanted, size))
    for step in range(-1, 3):
        away = np.abs(places - (first + step))
        near = ((_CUBIC + 2) * away - (_CUBIC + 3)) * away**2 + 1
        far = ((_CUBIC * away - 5 * _CUBIC) * away + 8 * _CUBIC) * away - 4 * _CUBIC
        np.add.at(found, (np.arange(wanted), np.clip(first + step, 0, size - 1)), np.where(away <= 1, near, far))
    return found
