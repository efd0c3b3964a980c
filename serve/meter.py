"""How fast pictures are made here, as measured: the base of every time that a client is told."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Literal, TypeVar, get_args

_WEIGHT = 0.1
"""Of the newest value in an average."""
_MOST = 256
"""Kinds, and numbers of rows of a kind."""
Part = Literal["prepare", "preview", "decode"]
"""What is done once for a picture: its prompt and pictures are encoded, it is shown on its way, it is decoded."""
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Meter:
    """Seconds of what is done for pictures, by their kind: what takes as long. For any thread.

    Of each it knows the kinds that it measured last, so that clients who ask for every size there is fill no memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rounds: dict[Hashable, dict[int, float]] = {}
        self._rows: dict[Hashable, float] = {}
        self._parts: dict[Part, dict[Hashable, float]] = {part: {} for part in get_args(Part)}

    @property
    def has_steps(self) -> bool:
        """Whether a step was ever measured."""
        return bool(self._rounds)

    def stepped(self, kind: Hashable, rows: int, seconds: float) -> None:
        """A step of `rows` pictures together took so long."""
        with self._lock:
            of_kind = self._rounds.get(kind, {})
            _average(of_kind, rows, seconds)
            _keep(self._rounds, kind, of_kind)
            _average(self._rows, kind, seconds / rows)

    def took(self, part: Part, kind: Hashable, seconds: float) -> None:
        """Something that is done once for a picture took so long."""
        with self._lock:
            _average(self._parts[part], kind, seconds)

    def round(self, kind: Hashable, rows: int) -> float:
        """Seconds for a step of `rows` pictures together, 0 while none was measured.

        As that of about as many; of other kinds where this one is not known.
        """
        with self._lock:
            if kind in self._rounds:
                return _of_rows(self._rounds[kind], rows)
            others = [_of_rows(each, rows) for each in self._rounds.values()]
        return sum(others) / len(others) if others else 0.0

    def row(self, kind: Hashable) -> float:
        """Seconds for a step of one picture among as many as there were of late; of other kinds as `round`."""
        with self._lock:
            return _mean_or(self._rows, kind)

    def once(self, part: Part, kind: Hashable) -> float:
        """Seconds of what is done once for a picture, 0 while none was measured; of other kinds as `round`."""
        with self._lock:
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


def _average(values: dict[K, float], key: K, new: float) -> None:
    old = values.get(key)
    _keep(values, key, new if old is None else (1 - _WEIGHT) * old + _WEIGHT * new)


def _keep(values: dict[K, V], key: K, value: V) -> None:
    """Note a value as the newest, and forget the oldest where there are many."""
    values.pop(key, None)
    values[key] = value
    if len(values) > _MOST:
        del values[next(iter(values))]
