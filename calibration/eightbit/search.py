"""Which groups are in eight bits: as much arithmetic as the budget allows, by what each group loses alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...engines import Engine
from ..losses import decibels
from .reference import Call
from .switched import SwitchedEngine

FREE_SHARE = 0.04
"""Of the arithmetic of all layers: what may stay in fp32 without being asked for."""
LEAST_GAIN_DB = 1.0
"""What a hundredth of the arithmetic in fp32 must gain, to stay there without being asked for."""
LEAST_SHARE = 0.1
"""Of the arithmetic. With less in eight bits the budget counts as one that cannot be met."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A choice, drawn and measured. kept: the values of the groups that stay in fp32.

    share: of the arithmetic of the denoiser that is in eight bits. within: whether it is within the budget.
    figures: of the images, see `Scan.figures`.
    """

    kept: tuple[str, ...]
    share: float
    within: bool
    figures: dict[str, Any]


def losses_alone(engine: SwitchedEngine, calls: Sequence[Call], told: Callable[[int, int], None]) -> dict[str, float]:
    """Noise over signal of the denoiser's outputs when one group or attention alone is in eight bits, by its value: the
    mean of `calls`.

    told: called with the runs of the model that are done, and all of them.
    """
    found: dict[str, float] = {}
    for value in engine.values:
        engine.choose([value])
        found[value] = loss(
            engine, calls, partial(_after, told, len(found) * len(calls), len(engine.values) * len(calls))
        )
    return found


def _after(told: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    told(before + done, total)


def loss(engine: Engine, calls: Sequence[Call], told: Callable[[int], None] = lambda done: None) -> float:
    """Noise over signal of the outputs of `engine`, the mean of `calls`. told: called with the calls that are done."""
    ratios = []
    for done, (feeds, exact) in enumerate(calls, 1):
        made = engine(feeds)
        ratios += [
            float(np.sum(np.square(made[key] - each, dtype=np.float64)) / np.sum(np.square(each, dtype=np.float64)))
            for key, each in exact.items()
        ]
        told(done)
    return float(np.mean(ratios))


def in_decibels(ratio: float) -> float:
    """The signal-to-noise ratio of a ratio of noise to signal."""
    return round(decibels(1.0, ratio), 2)


def worth(order: Sequence[str], flops: Mapping[str, int], alone: Mapping[str, float]) -> int:
    """How many groups of `order`, from the first on, gain more in fp32 than their arithmetic costs.

    Losses of groups add up, so that the gain of one is known without drawing anything.
    """
    total, left, used = sum(flops[value] for value in order), sum(alone[value] for value in order), 0.0
    for i, value in enumerate(order):
        cost, after = flops[value] / total, left - alone[value]
        used += cost
        gain = 10 * np.log10(left / after) if after > 0 else np.inf
        if used > FREE_SHARE or gain < LEAST_GAIN_DB * 100 * cost:
            return i
        left = after
    return len(order)


def search(
    order: Sequence[str],
    flops: Mapping[str, int],
    alone: Mapping[str, float],
    quality: Callable[[Collection[str]], Probe],
) -> tuple[Probe | None, list[Probe]]:
    """The choice with the most arithmetic in eight bits that is within the budget, and all that were drawn.

    order: the groups' values, those first that are to stay in fp32 first. alone: the loss of each. quality: draws a
    choice, given what is kept. It starts with what is `worth` staying in fp32.
    None where nothing with at least `LEAST_SHARE` of the arithmetic in eight bits is within the budget.
    """
    total = sum(flops[value] for value in order)
    left = 1 - np.cumsum([flops[value] for value in order]) / total
    free, most = worth(order, flops, alone), int(np.sum(left >= LEAST_SHARE - 1e-9))
    probes: list[Probe] = []

    def draw(count: int) -> bool:
        probes.append(quality(order[:count]))
        return probes[-1].within

    if not draw(free):
        low, step = free, 1
        while not draw(high := min(low + step, most)):
            if high == most:
                return None, probes
            low, step = high, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if draw(middle) else (middle, high)
    within = [probe for probe in probes if probe.within]
    return max(within, key=lambda probe: (probe.share, probe.figures["measured"])), probes
