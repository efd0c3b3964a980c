"""`Conditioning`: the sizes and the score of a picture, as SDXL was trained with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.arrays import Array
from ..common.checks import is_number, is_whole
from ..common.errors import RequestError

_NEGATIVE_SCORE = 2.5
_LARGEST_SIZE = 1_000_000


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Podell et al. 2023, section 2.2. Sizes are (height, width) and crops (top, left), in pixels, as in diffusers.

    original_size: of the picture before it was scaled (default: the size asked for). crop: its upper left corner
    (default: 0, 0). target_size: of the picture (default: the size asked for). aesthetic_score: what the refiner is
    given in its place (default: 6, and 2.5 for the negative).
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None

    def __post_init__(self) -> None:
        for name in ("original_size", "crop", "target_size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _pair(name, value))
        score = self.aesthetic_score
        if score is not None:
            if not is_number(score) or not abs(score) <= _LARGEST_SIZE:
                raise RequestError(f"aesthetic_score must be a number, found {score!r}")
            object.__setattr__(self, "aesthetic_score", float(score))

    def time_ids(self, height: int, width: int, *, scored: bool) -> Array:
        """The numbers that the U-Net is given of a picture of this size, float32 (6,), or (5,) where it is scored."""
        size = (height, width)
        score = 6.0 if self.aesthetic_score is None else self.aesthetic_score
        last = (score,) if scored else self.target_size or size
        return np.array([*(self.original_size or size), *(self.crop or (0, 0)), *last], np.float32)

    def negative(self, given: Conditioning | None, *, scored: bool, from_image: bool) -> Conditioning:
        """What the negative prompt's rows are given, where `given` was asked for them.

        As diffusers: the sizes are those of the prompt where none are given. A score goes without the prompt's crop; a
        model without scores that starts from an image takes the prompt's crop, whatever is given.
        """
        if given is None and not scored:
            return self
        given = given or Conditioning()
        return Conditioning(
            original_size=given.original_size or self.original_size,
            crop=self.crop if from_image and not scored else given.crop,
            target_size=given.target_size or self.target_size,
            aesthetic_score=_NEGATIVE_SCORE if given.aesthetic_score is None else given.aesthetic_score,
        )


def _pair(name: str, value: Any) -> tuple[int, int]:
    whole = isinstance(value, (tuple, list)) and all(is_whole(part) and 0 <= part <= _LARGEST_SIZE for part in value)
    if not whole or len(value) != 2:
        raise RequestError(f"{name} must be two whole numbers, height or top first, found {value!r}")
    return int(value[0]), int(value[1])
