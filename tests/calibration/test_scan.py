"""What a scan accepts, and the figures of quality."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.calibration import Scan
from diffoundry.calibration.quality import compare, psnr
from diffoundry.calibration.sessions import Recorder
from diffoundry.common.errors import DiffoundryError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, "from 1 to 1024 prompts"),
        ({"prompts": "a text"}, "from 1 to 1024 prompts in a list, found 'a text'"),
        ({"prompts": ("a", " ")}, "must be a text that is not empty, found ' '"),
        ({"budget_db": -1}, "the least PSNR must be from 0 to 120 dB, found -1"),
        ({"budget_db": "35"}, "the least PSNR must be from 0 to 120 dB, found '35'"),
        ({"budget_db": float("nan")}, "the least PSNR must be from 0 to 120 dB, found nan"),
        ({"prompts": (1,)}, "must be a text that is not empty, found 1"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, found 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"size": (64, 60)}, "multiple of 8, found 64x60"),
        ({"size": (0, 64)}, "a side must be a whole number from 1"),
        ({"size": 64}, "a width and a height, found 64"),
        ({"size": (64,)}, "a width and a height"),
    ],
)
def test_a_scan_that_cannot_be_run_is_refused(options, message):
    with pytest.raises(DiffoundryError, match=message) as found:
        Scan(**options)
    assert "\n" not in str(found.value)


def test_a_scan_keeps_what_it_was_given():
    scan = Scan(["a", "b"], 3, [64, 128], 7)
    assert (scan.prompts, scan.steps, scan.size, scan.seed) == (("a", "b"), 3, (64, 128), 7)
    assert (len(Scan().prompts), Scan().budget_of("fp16").least, Scan().budget_of("int8").least) == (3, 35.0, 25.0)
    assert Scan(budget_db=30).budget_of("fp16") == Scan(budget_db=30).budget_of("int8") == Budget("psnr", 30.0)


def test_psnr():
    image = np.zeros((4, 4, 3), np.uint8)
    assert psnr(image, image) == 120
    assert psnr(image, image + np.uint8(255)) == pytest.approx(0)
    assert psnr(image + np.uint8(10), image) == pytest.approx(20 * np.log10(255 / 10))


def test_the_ratio_of_an_output_is_the_lowest_over_calls():
    calls = [({"x": np.float32([k])}, {"y": np.float32([1.0, -1.0])}) for k in (0.1, 0.01)]
    calls += [({"x": np.float32([0])}, {"y": np.float32([1.0, -1.0])})]
    assert compare(lambda feeds: {"y": np.float32([1, -1]) + feeds["x"]}, calls) == {"y": 20.0}
    assert compare(lambda feeds: {"y": np.float32([1, np.inf])}, calls) == {"y": -200.0}
    assert compare(lambda feeds: {"y": np.float32([1, np.nan])}, calls) == {"y": -200.0}


def test_calls_are_kept_as_they_were():
    calls, feeds = Recorder(4), {"x": np.zeros(2, np.float32), "same": np.ones(3)}
    for k in range(6):
        feeds["x"][:] = k
        calls.add(feeds, {"y": feeds["x"]})
    assert [kept["x"][0] for kept, _ in calls.kept] == [0, 1, 2, 3]
    assert [made["y"][0] for _, made in calls.kept] == [0, 1, 2, 3]
    assert calls.kept[0][0]["same"] is calls.kept[3][0]["same"]
    assert [kept["x"][0] for kept, _ in calls.sample(1)] == [0, 2, 3]
    assert [kept["x"][0] for kept, _ in calls.sample(2)] == [0, 1, 3]
