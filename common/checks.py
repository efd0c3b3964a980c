"""Checks of the numbers that callers and files give. NumPy's numbers count, and True is no number."""

from __future__ import annotations

import math
import operator
from typing import Any, TypeGuard

import numpy as np

from .errors import RequestError

MOST_THREADS = 1024
MOST_IMAGES = 4096
"""Of one run."""
LARGEST_SIDE = 16384
"""Of a picture, in pixels."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is an int or a float, which may be infinite or NaN."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a number that a float holds, neither infinite nor NaN."""
    try:
        return is_number(value) and math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int. Raises `RequestError` when it is no whole number from `low` to `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, found {value!r}")
    return number
