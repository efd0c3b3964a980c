"""Classifier-free guidance: which rows a model call has, and how they are combined."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..bundle import RequestError

MODES = ("joint", "split", "off")


@dataclass(frozen=True, slots=True)
class Guidance:
    """Ho & Salimans 2022, equation 6: m = m_negative + scale · (m_prompt − m_negative).

    mode: `joint` runs both halves in one call, `split` in two calls of half the memory, `off` runs the prompt alone.
    interval: the part of the steps, from 0 to 1, in which guidance is on (Kynkäänniemi et al. 2024).
    """

    scale: float = 7.5
    mode: str = "joint"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise RequestError(f"guidance must be a number of at least 0, found {self.scale}")
        if self.mode not in MODES:
            raise RequestError(f"unknown guidance mode {self.mode!r}: choose one of {', '.join(MODES)}")
        low, high = self.interval
        if not (0 <= low <= high <= 1):
            raise RequestError(f"the guidance interval must be two numbers 0 ≤ start ≤ end ≤ 1, found {low} {high}")

    @property
    def active(self) -> bool:
        """Whether any negative rows are needed at all."""
        return self.mode != "off" and self.scale > 1

    def at(self, k: int, steps: int) -> bool:
        """Whether step k of `steps` is guided."""
        low, high = self.interval
        return self.active and low * steps <= k < high * steps
