"""How far a long work is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, int], None]
"""`progress(part, done, total)`: before each part, while a long one goes on, and once at the end."""


class Meter:
    """Counts the parts of one work for a `Progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress or (lambda part, done, total: None), 0, total

    def show(self, part: str, fraction: float = 0.0) -> None:
        """Say which part goes on, and how much of it is done."""
        self._progress(part, self._done + fraction, self._total)

    def step(self) -> None:
        """One part more is done."""
        self._done += 1

    def end(self) -> None:
        """Say that all is done."""
        self._progress("done", self._total, self._total)
