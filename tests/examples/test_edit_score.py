"""The judge of edits, on rendered pictures of which the right judgement is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffoundry.examples.pico.edit_score import (
    SLACK,
    difference_outside,
    is_kept_outside,
    judge_edit,
    read_inside,
    score_edits,
)
from diffoundry.examples.pico.world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, render

SCENE = Scene("small", "red", "star", "at the left", "navy")
OTHERS = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES, "background": BACKGROUNDS}


def another(scene: Scene, attribute: str) -> Scene:
    value = next(value for value in OTHERS[attribute] if value != getattr(scene, attribute))
    return replace(scene, **{attribute: value})


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[top:bottom, left:right] = True
    return mask


MASK = box(6, 19, 33, 46)


@pytest.mark.parametrize("attribute", OTHERS)
def test_an_edit_is_right_when_it_changes_what_the_caption_changes_and_keeps_the_rest(attribute):
    after = another(SCENE, attribute)
    edit = judge_edit(render(after, np.random.default_rng(0)), SCENE, after)
    assert edit.right
    assert set(edit.changed) == {attribute}
    assert set(edit.kept) == set(OTHERS) - {attribute}


@pytest.mark.parametrize("attribute", OTHERS)
def test_the_source_itself_is_no_edit(attribute):
    edit = judge_edit(render(SCENE), SCENE, another(SCENE, attribute))
    assert edit.changed == {attribute: False}
    assert all(edit.kept.values())


@pytest.mark.parametrize("lost", ["size", "shape", "place", "background"])
def test_an_edit_that_loses_a_kept_attribute_is_wrong(lost):
    after = another(SCENE, "color")
    edit = judge_edit(render(another(after, lost)), SCENE, after)
    assert edit.changed == {"color": True}
    assert [name for name, right in edit.kept.items() if not right] == [lost]
    assert not edit.right


def test_the_score_counts_attributes_and_whole_pictures():
    after = another(SCENE, "color")
    results = [render(after), render(SCENE), render(another(after, "place")), np.full((64, 64, 3), 90, np.uint8)]
    shares = score_edits(results, [(SCENE, after)] * 4)
    # the last, an empty grey picture, has none of them
    assert shares == {"changed": 0.5, "kept": (4 + 4 + 3 + 0) / 16, "right": 0.25}


def test_an_edit_must_change_something():
    with pytest.raises(ValueError, match="an edit changes an attribute, found 'a small red star"):
        judge_edit(render(SCENE), SCENE, SCENE)


def inpainted(after: Scene) -> np.ndarray:
    return np.where(MASK[..., None], render(after), render(SCENE))


def test_inpainting_keeps_the_outside_and_shows_the_new_shape_inside():
    after = replace(SCENE, shape="ring", color="yellow")
    source, result = render(SCENE), inpainted(after)
    assert difference_outside(source, result, MASK) == 0
    assert is_kept_outside(source, result, MASK, source, slack=0)
    assert read_inside(result, MASK) == {name: getattr(after, name) for name in OTHERS}
    assert read_inside(source, MASK)["shape"] == "star"


@pytest.mark.parametrize("background", [name for name in BACKGROUNDS if name != SCENE.background])
def test_another_background_is_not_kept(background):
    source = render(SCENE)
    result = render(replace(SCENE, background=background))
    assert not is_kept_outside(source, result, MASK, source)
    gap = np.abs(np.subtract(BACKGROUNDS[background], BACKGROUNDS[SCENE.background])).mean()
    assert difference_outside(source, result, MASK) == pytest.approx(gap)


def test_what_the_autoencoder_loses_is_allowed_and_no_more():
    source = render(SCENE)
    round_trip = source + np.uint8(3)
    assert is_kept_outside(source, source + np.uint8(3), MASK, round_trip, slack=0)
    assert not is_kept_outside(source, source + np.uint8(4), MASK, round_trip, slack=0)
    assert is_kept_outside(source, source + np.uint8(3 + SLACK), MASK, round_trip)
    assert not is_kept_outside(source, source + np.uint8(4 + SLACK), MASK, round_trip)


def test_the_margin_around_the_mask_does_not_count():
    source = render(SCENE)
    result = source.copy()
    result[30:34, 33:41] = 255
    assert difference_outside(source, result, MASK) == 0
    assert difference_outside(source, result, MASK, margin=7) > 0


def test_a_shape_outside_the_mask_is_not_read():
    moved = render(replace(SCENE, shape="ring", place="at the right"))
    assert read_inside(moved, MASK)["shape"] is None
    assert read_inside(moved, MASK)["background"] == "navy"
    assert read_inside(moved, box(33, 19, 62, 46))["shape"] == "ring"


@pytest.mark.parametrize("mask", [np.zeros((64, 64), np.uint8), np.zeros((8, 8), bool)])
def test_a_mask_must_be_of_booleans_and_of_the_pictures_size(mask):
    with pytest.raises(ValueError, match=r"a mask must be bool of shape \(64, 64\), found"):
        difference_outside(render(SCENE), render(SCENE), mask)
    with pytest.raises(ValueError, match=r"a mask must be bool of shape \(64, 64\), found"):
        read_inside(render(SCENE), mask)


def test_a_mask_of_everything_leaves_nothing_to_compare():
    with pytest.raises(ValueError, match="the mask leaves no pixel further than 8 pixels outside it"):
        difference_outside(render(SCENE), render(SCENE), np.ones((64, 64), bool))


def test_pictures_must_be_of_the_worlds_size():
    with pytest.raises(ValueError, match="a picture must be uint8 of shape"):
        difference_outside(render(SCENE), render(SCENE).astype(np.float32), MASK)
