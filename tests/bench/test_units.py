"""How figures are written."""

from __future__ import annotations

import pytest

from diffoundry.bench import units
from diffoundry.tests.bench.reports import HOSTILE, five


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (4.2e-7, "0.420 µs"),
        (9.996e-4, "1.00 ms"),
        (0.0412, "41.2 ms"),
        (0.9996, "1.00 s"),
        (1.2345, "1.23 s"),
        (599, "599 s"),
        (912, "15.2 min"),
        (1e5, "27.8 h"),
    ],
)
def test_seconds_have_three_digits_and_a_unit(value, text):
    assert units.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.04123, "0.0412"), (9.996, "10.0"), (1234.5, "1,234")])
def test_digits(value, text):
    assert units.digits(value) == text


def test_bytes_and_amounts():
    assert units.size(3 << 29) == "1.50 GiB"
    assert units.size(3 << 19) == "1.50 MiB"
    assert units.size(10**400).endswith("GiB")
    assert units.rate(2.1e11, "flop/s") == "210 Gflop/s"
    assert units.amount(1.2e8) == "120 M"
    assert units.share(0.294) == "29 %"


def test_what_cannot_be_shown_is_left_out():
    shown = units.plain(HOSTILE)
    assert shown.isprintable()
    assert shown.encode("utf-8")
    assert units.plain("a\n  b\x00", 10) == "a b"
    assert units.plain("a" * 50, 10) == "a" * 9 + "…"


def test_the_picture_of_each_system_is_told():
    report = five()
    assert [units.picture(report, each) for each in report.systems] == [
        "78.2 dB, 1 level",
        "reference",
        "identical",
        "31.4 dB, 87 levels †",
        "–",
    ]
    assert "diffusers, fp32" in units.footnote(report)
    assert units.MARK in units.footnote(report)
