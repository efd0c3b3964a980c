"""Optimization profiles: the shapes that a plan takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from ..bundle.reader import Rule

_LARGEST_AXIS = 1 << 31
Shape = tuple[Annotated[int, Rule(lambda size: 1 <= size < _LARGEST_AXIS, f"be from 1 to {_LARGEST_AXIS - 1}")], ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """For each input of a component the least, usual and largest shape. `name` says it to people."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def __post_init__(self) -> None:
        for name, (least, usual, largest) in self.shapes.items():
            if not all(a <= b <= c for a, b, c in zip(least, usual, largest, strict=True)):
                raise ValueError(f"the shapes of {name} must be the least, the usual and the largest")

    @property
    def static(self) -> bool:
        """Whether it takes one shape of each input and no other."""
        return all(least == largest for least, _, largest in self.shapes.values())

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes, every one of them named, can be run."""
        return shapes.keys() == self.shapes.keys() and all(
            len(shape) == len(self.shapes[name][0])
            and all(
                low <= size <= high
                for low, size, high in zip(self.shapes[name][0], shape, self.shapes[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """How far from the usual shapes these are: the sum of |log ratio| over all axes; a static profile is at 0."""
        return sum(
            abs(math.log(size / usual))
            for name, shape in shapes.items()
            for size, usual in zip(shape, self.shapes[name][1], strict=True)
        )
