"""The scale of each value: by amax, percentile, squared error and entropy, the one that its layers lose least with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ...common.arrays import Array
from .formats import Format, Scale
from .histogram import divergence, noise, quantile
from .layers import Group
from .outputs import losses
from .statistics import Statistics

_PERCENTILES = (0.9999, 0.99999)
_PARTS = 2.0 ** (-np.arange(1, 17) / 8)
"""Of the largest magnitude, tried as the limit of what can be held."""


def candidates(statistics: Statistics, form: Format) -> dict[str, dict[str, float]]:
    """By method the scale of each value that was seen.

    A type with a fraction has one: the largest magnitude at its largest number.
    """
    largest = {value: amax for value, amax in statistics.largest().items() if amax > 0}
    limits = {"amax": largest}
    if form.name == "int8":
        counted = {value: statistics.of(value).sum(axis=0) for value in largest}
        for share in _PERCENTILES:
            limits[f"percentile {100 * share:g}"] = {v: quantile(each, share) for v, each in counted.items()}
        costs: dict[str, Callable[[Array, float], float]] = {
            "mse": lambda each, limit: float(noise(each, limit / form.largest, form)),
            "entropy": divergence,
        }
        for method, cost in costs.items():
            limits[method] = {v: min(amax * _PARTS, key=partial(cost, counted[v])) for v, amax in largest.items()}
    return {
        method: {
            v: float(np.float32(min(limit or largest[v], largest[v]) / form.largest)) for v, limit in found.items()
        }
        for method, found in limits.items()
    }


def choose(
    source: Path,
    component: str,
    form: Format,
    groups: Sequence[Group],
    statistics: Statistics,
    calls: Sequence[Mapping[str, Array]],
    told: Callable[[int, int], None],
) -> dict[str, Scale]:
    """The best scale of each value that was seen, judged on `calls`: feeds that were not counted in `statistics`."""
    tried = candidates(statistics, form)
    seen = [group for group in groups if group.value in tried["amax"]]
    found = losses(source, component, form, seen, list(tried.values()), calls, told)
    best, methods = found.argmin(axis=0), list(tried)
    scales = {}
    for j, group in enumerate(seen):
        method = methods[best[j]]
        loss = round(float(-10 * np.log10(max(found[best[j], j], 1e-20))), 2)
        scales[group.value] = Scale(group.value, tried[method][group.value], method, loss)
    return scales
