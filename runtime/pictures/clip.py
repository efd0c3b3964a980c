"""Pictures as image encoders read them: the numbers of transformers' processors for CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...common.arrays import Array
from ...common.errors import RequestError

_MOST_PIXELS = 1 << 26
_BICUBIC = Image.Resampling.BICUBIC


def clip_pixels(image: Image.Image, side: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The middle of `image`, its shorter side scaled to `side`, normalized, float32 (3, side, side).

    Raises `RequestError` for a picture that is so narrow that it would become too large.
    """
    width, height = image.size
    shorter = min(width, height)
    size = int(side * width / shorter), int(side * height / shorter)
    if size[0] * size[1] > _MOST_PIXELS:
        raise RequestError(f"a picture of {width}x{height} is too narrow for an image encoder: crop it first")
    scaled = image.resize(size, _BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return _normalized(scaled.crop((left, top, left + side, top + side)), mean, std)


def stretched_pixels(image: Image.Image, side: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The whole of `image`, both sides scaled to `side`, normalized, float32 (3, side, side)."""
    return _normalized(image.convert("RGB").resize((side, side), _BICUBIC), mean, std)


def _normalized(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Array:
    unit = np.asarray(image.convert("RGB")).astype(np.float32) * np.float32(1 / 255)
    pixels = (unit - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.asarray(pixels.transpose(2, 0, 1), np.float32, order="C")
