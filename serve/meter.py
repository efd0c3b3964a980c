"""How fast pictures are made here, as measured: the base of every time that a client is told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Literal

_WEIGHT = 0.1
"""Of the newest value in an average."""
Part = Literal["prepare", "preview", "decode"]
"""What is done once for a picture: its prompt and pictures are encoded, it is shown on its way, it is decoded."""


class Meter:
    """Seconds of what is done for pictures, by their kind: what takes as long."""

    def __init__(self) -> None:
        self._rounds: defaultdict[Hashable, dict[int, float]] = defaultdict(dict)
        self._rows: dict[Hashable, float] = {}
        self._parts: defaultdict[Part, dict[Hashable, float]] = defaultdict(dict)

    @property
    def has_steps(self) -> bool:
        """Whether a step was ever measured."""
        return bool(self._rounds)

    def stepped(self, kind: Hashable, rows: int, seconds: float) -> None:
        """A step of `rows` pictures together took so long."""
        _average(self._rounds[kind], rows, seconds)
        _average(self._rows, kind, seconds / rows)

    def took(self, part: Part, kind: Hashable, seconds: float) -> None:
        """Something that is done once for a picture took so long."""
        _average(self._parts[part], kind, seconds)

    def round(self, kind: Hashable, rows: int) -> float:
        """Seconds for a step of `rows` pictures together, 0 while none was measured.

        As that of about as many; of other kinds where this one was not seen yet.
        """
        if kind in self._rounds:
            return _of_rows(self._rounds[kind], rows)
        others = [_of_rows(each, rows) for each in self._rounds.values()]
        return sum(others) / len(others) if others else 0.0

    def row(self, kind: Hashable) -> float:
        """Seconds for a step of one picture among as many as there were of late; of other kinds as `round`."""
        return _mean_or(self._rows, kind)

    def once(self, part: Part, kind: Hashable) -> float:
        """Seconds of what is done once for a picture, 0 while none was measured; of other kinds as `round`."""
        return _mean_or(self._parts[part], kind)


def _mean_or(known: dict[Hashable, float], kind: Hashable) -> float:
    """The value of a kind, the mean of others where it has none."""
    return known[kind] if kind in known else sum(known.values()) / max(1, len(known))


def _of_rows(known: dict[int, float], rows: int) -> float:
    """Seconds by the nearest number of rows that was measured."""
    if rows in known:
        return known[rows]
    nearest = min(known, key=lambda each: (abs(each - rows), -each))
    return known[nearest] * rows / nearest


def _average(values: dict[Hashable, float] | dict[int, float], key: Hashable, new: float) -> None:
    own: dict[Hashable, float] = values  # type: ignore[assignment]
    own[key] = new if key not in own else (1 - _WEIGHT) * own[key] + _WEIGHT * new
