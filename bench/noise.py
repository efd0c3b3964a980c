"""Where a figure lies by its values in one run: wide enough for the next run to agree, and no wider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .timing import median, percentile

_MANY = 12
"""From so many values on, the interval is from the 10th to the 90th percentile."""
_SURE, _MARGIN = 6, 0.02
"""Fewer values than so many have this part of them on each side for each one that is missing: they may lie close
together by chance."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a figure lies, in seconds, or in units of a rate."""

    low: float
    middle: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """From the 10th to the 90th percentile of the values of one run; at least one value.

    Narrower ones, quartiles or an interval of the median, which shrinks with each turn, were tried on runs of one
    bundle on a machine that others used too, and told a quarter of the pairs apart: a run knows how its turns scatter,
    not how far away the next run is. Fewer than twelve values have not been everywhere: theirs is the range of all,
    stretched the more the fewer they are.
    """
    middle, count = median(values), len(values)
    if count >= _MANY:
        return Interval(percentile(values, 10), middle, percentile(values, 90))
    low, high = min(values), max(values)
    room = (high - low) * (_MANY - count) / _MANY
    margin = _MARGIN * max(0, _SURE - count)
    return Interval((low - room) * (1 - margin), middle, (high + room) * (1 + margin))
