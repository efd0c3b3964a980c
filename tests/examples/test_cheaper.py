"""Steps that cost less, held against fewer steps in equal time."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from diffoundry.examples.pico.cheaper import FEWER, FORECAST, INTERVAL, Row, beats, main


def row(kind, calls, median, low):
    return Row(kind, "", calls, median, low, 1.0)


def test_a_setting_must_be_nearer_than_fewer_steps_in_equal_time():
    fewer = [row(FEWER, 10, 40, 30), row(FEWER, 14, 50, 40), row(FEWER, 18, 60, 50)]
    assert beats(row(FORECAST, 12, 46, 36), fewer)  # between 40 and 50, 30 and 40
    assert not beats(row(FORECAST, 12, 44, 36), fewer)
    assert not beats(row(FORECAST, 12, 46, 34), fewer)
    assert not beats(row(FORECAST, 19, 99, 99), fewer)  # nothing in equal time to hold it against


@pytest.mark.slow
def test_the_table_says_what_is_nearer(bundle_of, tmp_path):
    drawing = tmp_path / "cheaper.png"
    options = [str(bundle_of("pico")), "--captions", "2", "--scheduler", "euler", "--plot", str(drawing), "--json"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found[0]["calls"], found[0]["psnr_db"]) == (20, 120)
    calls = {(each["kind"], each["what"]): each["calls"] for each in found}
    assert calls[FEWER, "12"] == 12 and calls[INTERVAL, "0 to 0.8"] == 18  # 16 guided, and 4 of half the work
    offered = next(each for each in found if each["kind"] == FORECAST)
    assert offered["what"] == "first 3, then 1 in 2, degree 1" and offered["calls"] == 12
    assert not any(each["beats"] for each in found if each["kind"] == INTERVAL)
    assert Image.open(drawing).size == (840, 540)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.gif"], "the drawing x.gif must have a name that ends in .png or .svg"),
        (["--scheduler", "heun", "--captions", "1"], "heun"),
        (["--scheduler", "no_such"], "no_such"),
    ],
)
def test_what_cannot_be_drawn_is_told(options, message, bundle_of):
    done = CliRunner().invoke(main, [str(bundle_of("pico")), *options])
    assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output
