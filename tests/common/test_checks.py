"""What counts as a number."""

import math
from decimal import Decimal

import numpy as np
import pytest

from diffoundry.common.checks import is_finite, is_number, is_whole, whole_number
from diffoundry.common.errors import RequestError, reason


@pytest.mark.parametrize(
    ("value", "number", "finite", "whole"),
    [
        (3, True, True, True),
        (np.int8(3), True, True, True),
        (0.5, True, True, False),
        (np.float32(0.5), True, True, False),
        (math.inf, True, False, False),
        (math.nan, True, False, False),
        (10**400, True, False, True),
        (True, False, False, False),
        (np.True_, False, False, False),
        ("3", False, False, False),
        (Decimal(3), False, False, False),
        (None, False, False, False),
    ],
)
def test_kinds_of_numbers(value, number, finite, whole):
    assert (is_number(value), is_finite(value), is_whole(value)) == (number, finite, whole)


@pytest.mark.parametrize("value", [0, 6, True, 2.0, "2", None, 10**400])
def test_a_number_out_of_range_is_refused_by_its_name(value):
    with pytest.raises(RequestError, match="steps must be a whole number from 1 to 5"):
        whole_number("steps", value, 1, 5)


def test_a_whole_number_becomes_an_int():
    assert type(whole_number("steps", np.int64(4), 1, 5)) is int


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  Error(s) in loading:\n\tsize mismatch\nmore"), "Error(s) in loading: size mismatch"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 400), "x" * 300),
    ],
)
def test_the_reason_of_an_error_is_one_line(error, said):
    assert reason(error) == said
