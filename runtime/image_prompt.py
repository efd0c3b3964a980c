"""`ImagePrompt`: a picture that is read beside the text, through an IP-Adapter of a bundle."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.arrays import Array
from ..common.checks import is_number
from ..common.errors import RequestError
from .control import acts_at, check_interval

_LARGEST_SCALE = 100.0
_MOST_IMAGES = 64


@dataclass(frozen=True, slots=True, eq=False)
class ImagePrompt:
    """Ye et al. 2023. name: of the IP-Adapter, as the bundle calls it, "" for the only one that it has. image: a
    picture, or a list of them (paths, PIL images, arrays (H, W, 3)).

    embeds: in place of images what the image encoder gives for them, float32 (images, …). scale: a factor on what it
    adds, or one for each attention of the denoiser that reads it, in diffusers' order. interval: the part of the steps,
    from 0 to 1, in which it acts.
    negative: a picture that the rows of the negative prompt read, or a list of as many as there are images; by default
    what diffusers gives them.
    mask: a picture that is white where the image is to act, stretched to the size of the drawing; of several images a
    list, one for each. Without masks several images are read as one, everywhere.
    """

    name: str
    image: Any = None
    scale: float | tuple[float, ...] = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    embeds: Array | None = None
    mask: Any = None
    negative: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RequestError(f"the name of an IP-Adapter must be a text, found {self.name!r:.80}")
        if (self.image is None) == (self.embeds is None):
            raise RequestError(f"the IP-Adapter {self.name} takes an image, or embeds in its place: give one of them")
        images = self.image if isinstance(self.image, (list, tuple)) else [self.image]
        if not 1 <= len(images) <= _MOST_IMAGES:
            raise RequestError(f"the IP-Adapter {self.name} takes from 1 to {_MOST_IMAGES} images, found {len(images)}")
        if self.embeds is not None:
            found: Array = np.zeros(())
            with contextlib.suppress(TypeError, ValueError), np.errstate(over="ignore"):
                real = np.asarray(self.embeds)
                found = real.astype(np.float32) if real.dtype.kind in "fiu" else found
            what = f"embeds of the IP-Adapter {self.name}".rstrip()
            if found.ndim not in (2, 3) or not 1 <= len(found) <= _MOST_IMAGES:
                raise RequestError(
                    f"{what} must be numbers of shape (images, …), 1 to {_MOST_IMAGES} images, found shape "
                    f"{found.shape}"
                )
            if not np.isfinite(found).all():
                raise RequestError(f"{what} have numbers that are not finite (NaN or infinity): make them again")
            object.__setattr__(self, "embeds", found)
        if self.mask is not None and len(self.masks) != self.count:
            raise RequestError(
                f"the IP-Adapter {self.name} takes a mask for each image, {self.count} in all, found {len(self.masks)}"
            )
        if self.negative is not None and len(self.negatives) not in (1, self.count):
            raise RequestError(
                f"the IP-Adapter {self.name} takes one negative image, or as many as images, {self.count} in all, "
                f"found {len(self.negatives)}"
            )
        scale = self.scale
        scales = scale if isinstance(scale, (list, tuple)) else (scale,)
        if not scales or not all(is_number(each) and 0 <= each <= _LARGEST_SCALE for each in scales):
            raise RequestError(
                f"the scale of the IP-Adapter {self.name} must be from 0 to {_LARGEST_SCALE:g}, or one such number for "
                f"each cross-attention, found {scale!r:.80}"
            )
        numbers = tuple(float(each) for each in scales)
        object.__setattr__(self, "scale", numbers if isinstance(scale, (list, tuple)) else numbers[0])
        object.__setattr__(self, "interval", check_interval(f"the IP-Adapter {self.name}", self.interval))

    @property
    def images(self) -> list[Any]:
        """The pictures, [] where embeddings are given."""
        return _listed(self.image)

    @property
    def masks(self) -> list[Any]:
        """A mask for each picture, or []."""
        return _listed(self.mask)

    @property
    def negatives(self) -> list[Any]:
        """The pictures that the rows of the negative prompt read, or []."""
        return _listed(self.negative)

    @property
    def count(self) -> int:
        """How many pictures, or embeddings of them, there are."""
        return len(self.images) if self.embeds is None else len(self.embeds)

    @property
    def groups(self) -> tuple[int, int]:
        """In how many groups its pictures are read apart from each other, and how many are in each."""
        return (1, self.count) if self.mask is None else (self.count, 1)

    def scales(self, layers: int, steps: int) -> Array:
        """The factor of each of `layers` in each of `steps`, float32 (steps, layers)."""
        found = np.zeros((steps, layers), np.float32)
        found[[acts_at(self.interval, k, steps) for k in range(steps)]] = np.asarray(self.scale, np.float32)
        return found


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def read_image_prompts(name: str, value: Any) -> tuple[ImagePrompt, ...]:
    """`value`, an `ImagePrompt` or several, as a tuple. Raises `RequestError` for anything else, or two of one name."""
    prompts: Sequence[Any] = (value,) if isinstance(value, ImagePrompt) else value
    if not isinstance(prompts, (tuple, list)) or not all(isinstance(each, ImagePrompt) for each in prompts):
        raise RequestError(f"{name} takes a list of diffoundry.ImagePrompt, found {type(value).__name__}")
    names = [each.name for each in prompts]
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise RequestError(f"the IP-Adapter {twice[0]} is given twice: give all its images in one ImagePrompt")
    return tuple(prompts)
