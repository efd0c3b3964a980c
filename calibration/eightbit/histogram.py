"""Histograms of magnitudes in bins of one relative width, and what rounding to a scale loses of them."""

from __future__ import annotations

from functools import cache

import numpy as np

from ...common.arrays import Array
from .formats import Format

PER_OCTAVE = 16
LOWEST, HIGHEST = -28, 20
"""Powers of two that the bins reach from and to; what is smaller is in the first, what is larger in the last."""
BINS = (HIGHEST - LOWEST) * PER_OCTAVE
_POINTS = 4
"""Points of a bin that stand for all in it: where between two steps a value lies matters."""


def count(values: Array) -> Array:
    """How many of the finite `values` have their magnitude in each bin, int64 (`BINS`,)."""
    magnitude = np.abs(values.ravel().astype(np.float32, copy=False))
    with np.errstate(divide="ignore"):
        places = np.floor((np.log2(magnitude) - LOWEST) * PER_OCTAVE)
    return np.bincount(np.clip(places, 0, BINS - 1).astype(np.int64), minlength=BINS)


@cache
def points() -> Array:
    """Magnitudes in each bin, float32 (`BINS`, points)."""
    steps = np.arange(BINS)[:, None] + (np.arange(_POINTS) + 0.5) / _POINTS
    return np.asarray(np.exp2(LOWEST + steps / PER_OCTAVE), np.float32)


@cache
def _energy() -> Array:
    return np.asarray(np.mean(points().astype(np.float64) ** 2, axis=1))


def signal(counts: Array) -> Array:
    """The sum of squares of what was counted, float64, over the last axis."""
    return np.asarray(counts @ _energy())


def noise(counts: Array, scale: float, form: Format) -> Array:
    """The sum of squared errors of rounding with `scale`, float64, over the last axis."""
    there = points()
    error = np.mean((form.rounded(there, scale).astype(np.float64) - there) ** 2, axis=1)
    return np.asarray(counts @ error)


def quantile(counts: Array, share: float) -> float:
    """The magnitude that `share` of all are under; 0 where nothing was counted."""
    total = counts.sum()
    if not total:
        return 0.0
    place = int(np.searchsorted(np.cumsum(counts), share * total))
    return float(np.exp2(LOWEST + (min(place, BINS - 1) + 1) / PER_OCTAVE))


def divergence(counts: Array, limit: float, levels: int = 128) -> float:
    """Kullback-Leibler divergence of what was counted from its form with `levels` steps up to `limit`, in nats."""
    fine = 16 * levels
    edges = np.exp2(LOWEST + np.arange(BINS + 1) / PER_OCTAVE)
    edges[0] = 0.0
    ends = np.linspace(0, limit, fine + 1)
    spread = np.diff(np.interp(ends, edges, np.concatenate([[0], np.cumsum(counts)])))
    spread[-1] += counts.sum() - spread.sum()
    held = spread > 0
    inside = spread.copy()
    inside[-1] = np.diff(np.interp(ends[-2:], edges, np.concatenate([[0], np.cumsum(counts)])))[0]
    steps, there = inside.reshape(levels, -1), held.reshape(levels, -1)
    each = steps.sum(1) / np.maximum(there.sum(1), 1)
    coarse = np.where(there, each[:, None], 0).ravel()
    total, made = spread.sum(), coarse.sum()
    if not total or not made:
        return np.inf
    p, q = spread[held] / total, np.maximum(coarse[held] / made, 1e-12)
    return float(np.sum(p * np.log(p / q)))
