"""What `bench.serving` finds: a way of drawing at a load."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = 4, 20, 50
SHORT, MIDDLE, LONG = (str(steps) for steps in STEPS)


@dataclass(frozen=True, slots=True)
class Measured:
    """A way at a load. load: of what `batched` can draw, None where all come at once; rate: requests a second.

    latency_ms: percentiles by the number of steps. images_per_s: the median of the turns.
    """

    load: float | None
    rate: float
    way: str
    latency_ms: dict[str, dict[str, float]]
    images_per_s: float

    @property
    def name(self) -> str:
        """How the load is called."""
        if self.load is None:
            return "all at once"
        return f"{self.load:.0%} of {self.rate / self.load:.1f}/s"
