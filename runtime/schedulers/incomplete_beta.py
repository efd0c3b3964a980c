"""The quantile of the beta distribution, which one sigma curve needs."""

from __future__ import annotations

import math

_HALVINGS = 200
_TERMS = 500
_TINY = 1e-300


def beta_quantile(q: float, a: float, b: float) -> float:
    """x such that a Beta(a, b) variable is below x with probability q."""
    if q <= 0 or q >= 1:
        return float(min(max(q, 0.0), 1.0))
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if beta_probability(middle, a, b) < q:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def beta_probability(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_probability(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    # modified Lentz: h = d1/(1 + d2/(1 + …)) with the odd and even coefficients of the fraction
    h, c, d = 1.0, 1.0, 1 / _far(1 - (a + b) * x / (a + 1))
    h = d
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1 / _far(1 + coefficient * d)
            c = _far(1 + coefficient / c)
            h *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * h


def _far(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
