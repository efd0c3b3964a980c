"""The values of options as they are written on the command line."""

from __future__ import annotations

import pytest

from diffoundry.cli.goal import parse_batch, parse_range, parse_size, parse_tokens
from diffoundry.common.errors import DiffoundryError


def test_values_are_read_as_they_are_written():
    assert parse_size("512x768") == (512, 768)
    assert parse_range("256x256-1024x512") == ((256, 256), (1024, 512))
    assert (parse_batch("4"), parse_batch("1-4")) == ((4, 4), (1, 4))
    assert (parse_tokens("256"), parse_tokens("64-512")) == ((256, 256), (64, 512))


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_size, "64", "WIDTHxHEIGHT"),
        (parse_size, "64x64x64", "WIDTHxHEIGHT"),
        (parse_size, "-64x64", "WIDTHxHEIGHT"),
        (parse_range, "64x64", "MIN-MAX"),
        (parse_batch, "many", "such as 4 or 1-4"),
        (parse_batch, "1-", "such as 4 or 1-4"),
        (parse_tokens, "64-", "such as 256 or 64-512"),
    ],
)
def test_what_is_no_size_range_or_batch_is_refused(parse, text, message):
    with pytest.raises(DiffoundryError, match=message):
        parse(text)
