"""Optimization profiles: the shapes that a plan takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.checks import is_whole
from ..common.errors import EngineError

Shape = tuple[int, ...]
_LARGEST_AXIS = 1 << 31


@dataclass(frozen=True, slots=True)
class Profile:
    """For each input of a component the least, usual and largest shape. `name` says it to people."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

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

    def to_json(self) -> dict[str, Any]:
        """As it stands in an engine's record."""
        return {"name": self.name, "shapes": {name: [list(s) for s in part] for name, part in self.shapes.items()}}

    @classmethod
    def from_json(cls, value: Any) -> Profile:
        """Read what `to_json` wrote. Raises `EngineError` when it is something else."""
        try:
            shapes = {}
            for name, part in value["shapes"].items():
                least, usual, largest = (tuple(_size(size) for size in shape) for shape in part)
                ordered = all(a <= b <= c for a, b, c in zip(least, usual, largest, strict=True))
                if not ordered:
                    raise ValueError(name)
                shapes[str(name)] = (least, usual, largest)
            return cls(str(value["name"]), shapes)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise EngineError("the profile of a plan cannot be read: compile the bundle again") from None


def _size(value: Any) -> int:
    if not is_whole(value) or not 1 <= value < _LARGEST_AXIS:
        raise ValueError(value)
    return value
