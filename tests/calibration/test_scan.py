"""What a scan accepts, and the figures of quality."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.calibration import Budget, Scan
from diffoundry.calibration.quality import compare, psnr
from diffoundry.calibration.sessions import Recorder
from diffoundry.common.errors import DiffoundryError, RequestError


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
        ({"budget": 0.9}, "the budget must be a Budget, found float"),
        ({"budget": Budget("ssim", 0.9), "budget_db": 30}, "a budget and a least PSNR say the same: give one of them"),
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


def reds(images, exact, prompts):
    """The share of pictures that are red; a budget of a user's own."""
    assert len(images) == len(exact) == len(prompts)
    return float(np.mean([image[..., 0].mean() > image[..., 1].mean() for image in images]))


def fails(images, exact, prompts):
    raise ValueError("no picture of a cat")


HERE = "diffoundry.tests.calibration.test_scan"


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("psnr=28", Budget("psnr", 28)),
        (" ssim = 0.95", Budget("ssim", 0.95)),
        (f"{HERE}:reds=0.5", Budget(f"{HERE}:reds", 0.5)),
    ],
)
def test_a_budget_is_read(text, budget):
    assert Budget.parse(text) == budget
    budget.check()


@pytest.mark.parametrize(
    "text", ["", "28", "psnr", "psnr=", "psnr=a lot", "ssim=nan", "lpips=0.1", "a b:c=1", "m:=1", ":f=1"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(
        RequestError, match=r"it is psnr=DB, ssim=FROM_0_TO_1 or module:function=NUMBER|must be a number"
    ):
        Budget.parse(text)


@pytest.mark.parametrize(("measure", "least"), [("ssim", 1.01), ("ssim", -0.1), ("psnr", 121), ("psnr", -1)])
def test_a_budget_that_nothing_can_reach_is_refused(measure, least):
    for odd in (10**400, "20", None, [1]):
        with pytest.raises(RequestError, match="of a budget must be a number"):
            Budget(measure, odd)
    for odd in (None, 5, b"psnr=1", [1]):
        with pytest.raises(RequestError, match="it is psnr=DB"):
            Budget.parse(odd)
    with pytest.raises(RequestError, match=f"the least {measure} of a budget is from 0 to "):
        Budget(measure, least)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ("no_such_module:f", "cannot be loaded .*No module named 'no_such_module'.*: name a function of a module"),
        (f"{HERE}:nothing", "cannot be loaded .*has no attribute 'nothing'"),
        (f"{HERE}:HERE", "is no function: name one of"),
    ],
)
def test_a_budget_that_cannot_be_taken_is_refused_before_anything_is_measured(measure, message):
    with pytest.raises(DiffoundryError, match=message):
        Budget(measure, 1).check()


def test_images_are_measured_as_the_budget_says():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    exact = [rng.integers(0, 255, (32, 32, 3), np.uint8) for _ in range(3)]
    images = [np.clip(each.astype(int) + rng.integers(-20, 20, each.shape), 0, 255).astype(np.uint8) for each in exact]
    scan = Scan(("a", "b", "c"), budget=Budget("ssim", 0.9))
    found = scan.figures(images, exact, "int8")
    wanted = sorted(
        metrics.structural_similarity(*each, channel_axis=2, data_range=255) for each in zip(images, exact, strict=True)
    )
    assert found["measured"] == pytest.approx(wanted[1]) and found["psnr_db"] == pytest.approx(26.9, abs=1)
    assert scan.is_within({**found, "measured": 0.9}, "int8") and not scan.is_within(
        {**found, "measured": 0.89}, "int8"
    )
    assert scan.asked("int8") == {"budget": "ssim=0.9"}
    assert scan.missed([found], "int8") == (f"have a ssim of {wanted[1]:.4g}", "--budget")
    plain = Scan(("a", "b", "c")).figures(images, exact, "int8")
    assert plain["measured"] == plain["psnr_db"] == found["psnr_db"]


def test_a_function_of_the_user_decides():
    red, grey = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    budget = Budget(f"{HERE}:reds", 0.5)
    assert budget.of([red, grey], [red, red], ["a", "b"]) == 0.5
    with pytest.raises(DiffoundryError, match=r"test_scan:fails fails: no picture of a cat"):
        Budget(f"{HERE}:fails", 1).of([red], [red], ["a"])
    with pytest.raises(DiffoundryError, match=r"gives array|gives .*: let it give a number"):
        Budget("builtins:zip", 1).of([red], [red], ["a"])
