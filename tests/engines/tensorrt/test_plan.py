"""Profiles: what a plan takes, how far it is, and the choice among several."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from diffoundry.bundle.reader import FieldError, read
from diffoundry.common.errors import EngineError
from diffoundry.engines.tensorrt.plan import Plan, Profile, Recipe, closest


def profile(name, least, usual, largest):
    return Profile(name, {"sample": (least, usual, largest), "timestep": (least[:1], usual[:1], largest[:1])})


SMALL = profile("small", (2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8))
LARGE = profile("large", (2, 4, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16))
RANGE = profile("range", (1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 32, 32))


def plan(name, own):
    return Plan(Recipe("unet", {}, "tensorrt-rtx", "1.7", ("sm89",), "", "fp16", own), Path(name), name, {})


PLANS = [plan("c", RANGE), plan("b", LARGE), plan("a", SMALL)]


def shapes(rows, height, width=None):
    return {"sample": (rows, 4, height, width or height), "timestep": (rows,)}


def test_a_profile_takes_what_lies_between_its_least_and_largest_shapes():
    assert SMALL.static and not RANGE.static
    assert SMALL.takes(shapes(2, 8))
    assert RANGE.takes(shapes(4, 32, 9))
    for wrong in (shapes(2, 7), shapes(5, 8), shapes(2, 33), {"sample": (2, 4, 8, 8)}, {**shapes(2, 8), "x": (1,)}):
        assert not RANGE.takes(wrong)
    assert not RANGE.takes({"sample": (2, 4, 8), "timestep": (2,)})


def test_the_distance_grows_with_the_ratio_to_the_usual_shape():
    assert RANGE.distance(shapes(2, 8)) == 0
    assert RANGE.distance(shapes(2, 16)) == pytest.approx(RANGE.distance(shapes(2, 8, 32)))
    assert RANGE.distance(shapes(2, 16)) < RANGE.distance(shapes(2, 32))


@pytest.mark.parametrize(
    ("asked", "chosen"), [(shapes(2, 8), "a"), (shapes(2, 16), "b"), (shapes(2, 24), "c"), (shapes(1, 8), "c")]
)
def test_a_static_plan_serves_before_the_dynamic_one(asked, chosen):
    assert closest("unet", PLANS, asked).key == chosen
    assert closest("unet", PLANS[::-1], asked).key == chosen


def of_text(name, least, most, rows=2):
    tokens = tuple((rows, count, 96) for count in (least, most, most))
    return plan(name, Profile(name, {"sample": ((rows, 4, 8, 8),) * 3, "encoder_hidden_states": tokens}))


@pytest.mark.parametrize(("asked", "told"), [(40, "40 tokens of text; built are: long"), (600, "600 tokens of text")])
def test_a_number_of_tokens_that_no_plan_takes_is_told_as_such(asked, told):
    plans, axis = [of_text("long, 64-512 tokens", 64, 512)], {"encoder_hidden_states": 1}
    shapes = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, asked, 96)}
    with pytest.raises(EngineError, match=f"no plan takes {told}.* Build with --tokens that hold them, or leave max_"):
        closest("transformer", plans, shapes, axis)
    assert closest("transformer", plans, {**shapes, "encoder_hidden_states": (2, 100, 96)}, axis).key == plans[0].key
    with pytest.raises(EngineError, match="Compile with a --shape and --batch that hold it"):  # another size, too
        closest("transformer", plans, {**shapes, "sample": (2, 4, 9, 9)}, axis)


def test_plans_that_take_a_picture_say_so_where_there_is_none():
    own = Profile("64x64", {"picture": ((1, 16, 84, 84), (1, 16, 128, 128), (1, 16, 196, 196))})
    with pytest.raises(EngineError, match="its plans take a picture: give one as the image, or use another --engine"):
        closest("transformer", [plan("a", own)], {"picture": (1, 16, 0, 2)})


def test_of_two_dynamic_plans_the_closer_one_serves():
    far = plan("far", profile("far", (1, 4, 8, 8), (2, 4, 32, 32), (4, 4, 32, 32)))
    near = plan("near", profile("near", (1, 4, 8, 8), (2, 4, 9, 9), (4, 4, 32, 32)))
    assert closest("unet", [far, near], shapes(2, 10)).key == "near"
    assert closest("unet", [far, near], shapes(2, 30)).key == "far"


def test_a_shape_outside_every_profile_is_told_with_what_was_built():
    with pytest.raises(EngineError, match=r"no plan takes sample 2x4x64x64.*built are: large; range; small.*--shape"):
        closest("unet", PLANS, shapes(2, 64))


def test_a_profile_is_read_back_as_it_was_written():
    assert read(Profile, json.loads(json.dumps(asdict(RANGE)))) == RANGE


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {},
        {"name": "x", "shapes": {"a": [[1], [2]]}},
        {"name": "x", "shapes": {"a": [[3], [2], [1]]}},
        {"name": "x", "shapes": {"a": [[0], [1], [1]]}},
        {"name": "x", "shapes": {"a": [[1], [True], [1]]}},
        {"name": "x", "shapes": {"a": [["1"], ["1"], ["1"]]}},
        {"name": "x", "shapes": {"a": [[1, 1], [1], [1]]}},
        {"name": "x", "shapes": {"a": [[1], [1], [1 << 40]]}},
    ],
)
def test_a_damaged_profile_is_refused(damaged):
    with pytest.raises(FieldError):
        read(Profile, damaged)
