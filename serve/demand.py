"""How much is asked for, held against what can be drawn."""

from __future__ import annotations

import math

_REQUESTS = 12
"""About so many of the last requests count."""
_CALM, _LASTING = 1.4, 2.0
"""The loads up to which there is no pressure, as random arrivals reach them by chance, and from which there is most."""


class Demand:
    """The load: seconds of work that is asked for in a second, by all but those who come when they were told to."""

    def __init__(self) -> None:
        self.load = 0.0
        self._count, self._mean, self._last = 0, 0.0, 0.0

    def come(self, now: float, work: float) -> None:
        """Somebody asks. work: seconds that it keeps the server busy, 0 where it is not known."""
        if not work:
            return
        self._count = min(self._count + 1, _REQUESTS)
        self._mean += (work - self._mean) / self._count
        span = _REQUESTS * self._mean
        self.load = self.load * math.exp((self._last - now) / span) + work / span
        self._last = now

    @property
    def pressure(self) -> float:
        """From 0, where what is asked for can be drawn, to 1, where it is twice as much.

        A queue is good for a burst: what would be refused is drawn a little later. Where more is asked for all the time
        there is always somebody for a row that becomes free, and to wait for it gains nothing.
        """
        return min(1.0, max(0.0, (self.load - _CALM) / (_LASTING - _CALM)))
