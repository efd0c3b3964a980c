"""Read the attributes of a scene off a picture: which size, colour, shape, place and background it shows.

The reading is analysis by synthesis. Background: the palette colour nearest to the median of the border. Colour: the
one nearest to the pixels that differ most from the background. Place: the one nearest to the centroid of the shape.
Shape and size: the rendering, moved to that centroid, that overlaps best; under `MIN_OVERLAP` it is no shape at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from .world import ATTRIBUTES, BACKGROUNDS, COLORS, NEW_SHAPES, PLACES, SHAPES, SIDE, SIZES, TWICE, Scene, coverage

MIN_OVERLAP = 0.75
"""Dice coefficient under which a blob counts as no shape."""

_RADII = (0.93, 0.98, 1.03, 1.08)
_NOTHING = 24.0
"""Largest difference to the background, of 255, at which a picture shows no shape."""


def read(image: np.ndarray, *, new: bool = False) -> dict[str, str | None]:
    """The attributes of a uint8 RGB picture of shape (64, 64, 3), each None when it shows none.

    new: whether it may show what `world` calls new, too. Raises ValueError for another shape or dtype.
    """
    _check_picture(image)
    pixels = image.astype(np.float32)
    background = _background(pixels)
    found: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
    found["background"] = _nearest(BACKGROUNDS, background)
    foreground = _foreground(pixels, background)
    if foreground is None:
        return found
    found["color"] = _nearest(COLORS, foreground)
    mask = _between(pixels, background, foreground)
    mask[mask < 0.15] = 0
    y, x = _centroid(mask)
    found["place"] = _nearest(
        {name: (SIDE / 2 + dx, SIDE / 2 + dy) for name, (dx, dy) in PLACES.items()}, np.array([x, y])
    )
    shapes = (*SHAPES, *NEW_SHAPES) if new else SHAPES
    halves = _halves(mask)
    if new and halves is not None:
        found["place"] = TWICE
        first, second = (_shape_of(half, shapes) for half in halves)
        found["shape"], found["size"] = first if first == second else (None, None)
    else:
        found["shape"], found["size"] = _shape_of(mask, shapes)
    return found


def _shape_of(mask: np.ndarray, shapes: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Shape and size of what a mask shows, of these shapes; None for each where it shows none."""
    y, x = _centroid(mask)
    overlaps = {
        (shape, size): max(_overlap(mask, shape, SIZES[size] * k, x, y) for k in _RADII)
        for shape in shapes
        for size in SIZES
    }
    shape, size = max(overlaps, key=lambda pair: overlaps[pair])
    return (shape, size) if overlaps[shape, size] >= MIN_OVERLAP else (None, None)


def _halves(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The left and the right half of a mask that shows a thing in each; None where it does not."""
    left, right = mask.copy(), mask.copy()
    left[:, SIDE // 2 :], right[:, : SIDE // 2] = 0, 0
    between, whole = mask[:, SIDE // 2 - 2 : SIDE // 2 + 2].sum(), mask.sum()
    both = min(left.sum(), right.sum()) > 0.3 * whole and between < 0.03 * whole
    return (left, right) if both else None


def read_mask(image: np.ndarray) -> np.ndarray:
    """Where a uint8 RGB picture of shape (64, 64, 3) shows its shape: bool (64, 64), nowhere if it shows none.

    A pixel belongs to the shape when it is nearer to the shape's colour than to the background. Raises as `read` does.
    """
    _check_picture(image)
    pixels = image.astype(np.float32)
    background = _background(pixels)
    foreground = _foreground(pixels, background)
    if foreground is None:
        return np.zeros((SIDE, SIDE), bool)
    return np.asarray(_between(pixels, background, foreground) > 0.5)


def score(pictures: Iterable[np.ndarray], scenes: Iterable[Scene], *, new: bool = False) -> dict[str, float]:
    """The share of each attribute that is right over the pairs, and `all`: their mean. new: as in `read`."""
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for picture, scene in zip(pictures, scenes, strict=True):
        found = read(picture, new=new)
        for name in ATTRIBUTES:
            right[name].append(found[name] == getattr(scene, name))
    shares = {name: float(np.mean(values)) for name, values in right.items()}
    return {**shares, "all": float(np.mean(list(shares.values())))}


def _check_picture(image: np.ndarray) -> None:
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 of shape ({SIDE}, {SIDE}, 3), found {image.dtype} {image.shape}")


def _background(pixels: np.ndarray) -> np.ndarray:
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    return np.asarray(np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0))


def _foreground(pixels: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    difference = np.linalg.norm(pixels - background, axis=2)
    if difference.max() < _NOTHING:
        return None
    return np.asarray(np.median(pixels[difference > 0.7 * difference.max()], axis=0))


def _between(pixels: np.ndarray, background: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """How far each pixel is on the way from background to foreground, in [0, 1]."""
    direction = foreground - background
    return np.asarray(np.clip((pixels - background) @ direction / (direction @ direction), 0, 1))


def _nearest(palette: dict[str, tuple[int, int, int]] | dict[str, tuple[float, float]], value: np.ndarray) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(np.array(palette[name]) - value)))


def _centroid(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    total = mask.sum()
    return float((mask * rows).sum() / total), float((mask * columns).sum() / total)


@functools.cache
def _own_centroid(shape: str) -> tuple[float, float]:
    """How far the centroid of a shape lies from its centre, as a fraction of its radius."""
    y, x = _centroid(coverage(shape, SIDE / 2, SIDE / 2, SIDE / 4))
    return (y - SIDE / 2) / (SIDE / 4), (x - SIDE / 2) / (SIDE / 4)


def _overlap(mask: np.ndarray, shape: str, radius: float, x: float, y: float) -> float:
    dy, dx = _own_centroid(shape)
    template = coverage(shape, x - dx * radius, y - dy * radius, radius)
    return float(2 * (mask * template).sum() / ((mask**2).sum() + (template**2).sum()))
