"""How fast pictures are made here, as measured: the base of every time that a client is told."""

from __future__ import annotations

from collections.abc import Hashable

_WEIGHT = 0.1
"""Of the newest value in an average."""


class Meter:
    """Seconds for a step and for the decoder, by kind of picture: what of a model and a size is alike."""

    def __init__(self) -> None:
        self._steps: dict[Hashable, float] = {}
        self._decodes: dict[Hashable, float] = {}

    def stepped(self, kind: Hashable, rows: int, seconds: float) -> None:
        """A step of `rows` pictures together took so long."""
        _average(self._steps, kind, seconds / rows)

    def decoded(self, kind: Hashable, seconds: float) -> None:
        """The decoder took so long for a picture."""
        _average(self._decodes, kind, seconds)

    def step(self, kind: Hashable) -> float | None:
        """Seconds for a step of one picture among others; of another kind where this one was not seen yet."""
        return _of(self._steps, kind)

    def decode(self, kind: Hashable) -> float:
        """Seconds for the decoder, 0 where it was never run."""
        return _of(self._decodes, kind) or 0.0


def _average(values: dict[Hashable, float], kind: Hashable, new: float) -> None:
    values[kind] = new if kind not in values else (1 - _WEIGHT) * values[kind] + _WEIGHT * new


def _of(values: dict[Hashable, float], kind: Hashable) -> float | None:
    if kind in values:
        return values[kind]
    return sum(values.values()) / len(values) if values else None
