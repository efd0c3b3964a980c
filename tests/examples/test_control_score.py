"""pico's ControlNet and IP-Adapter: what an outline is, how it is scored, and what the trained ones do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import diffoundry
from diffoundry.examples.pico import control_score
from diffoundry.examples.pico.control_score import drawers_of, iou, outlined, score_outlines, score_references, sheet
from diffoundry.examples.pico.scorer import read_mask
from diffoundry.examples.pico.world import SIDE, free_pose, mask_of, outline, paint, pose, render, split_scenes


def test_the_mask_is_read_off_the_picture():
    rng = np.random.default_rng(3)
    for scene in split_scenes()[1][:20]:
        mask = mask_of(scene, free_pose(rng))
        assert iou(read_mask(paint(scene, mask, rng)), mask > 0.5) > 0.9
        assert np.array_equal(paint(scene, mask_of(scene, pose(scene))), render(scene))
    assert not read_mask(np.full((SIDE, SIDE, 3), 90, np.uint8)).any()
    assert iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 0.0


def test_an_outline_is_the_edge_of_the_shape():
    scene = split_scenes()[1][0]
    mask = mask_of(scene, pose(scene)) > 0.5
    edge = outline(mask)
    assert edge.shape == (SIDE, SIDE, 3) and edge.dtype == np.uint8 and set(np.unique(edge)) == {0, 255}
    white = edge[..., 0] > 0
    inner, outer = white & mask, white & ~mask
    assert inner.sum() > 20 and outer.sum() > 20
    assert not outline(np.ones((SIDE, SIDE))).any()  # the border of the picture is no edge


def test_pictures_that_follow_score_in_full_and_others_do_not():
    def follows(captions, edges, seeds):
        scenes, masks = outlined(len(seeds), moved=False)
        return [paint(scene, mask) for scene, mask in zip(scenes, masks, strict=True)]

    def ignores(captions, edges, seeds):
        return [render(replace(scene, place="at the left")) for scene in outlined(len(seeds), moved=False)[0]]

    found = score_outlines(follows, 30)
    assert found["iou"] > 0.97 and found["color"] == found["shape"] == 1.0
    assert score_outlines(ignores, 30)["iou"] < 0.7 and score_references(ignores, 30)["both"] == 1.0


@pytest.mark.slow
def test_the_trained_ones_follow(checkpoint_of, tmp_path):
    pico = checkpoint_of("pico")
    out = tmp_path / "control.bundle"
    more = {"controlnets": {"outline": pico / "controlnet"}, "ip_adapters": {"look": pico / "ip_adapter"}}
    diffoundry.compile(pico, out, **more)
    drawers = drawers_of(out, 20, control_score.GUIDANCE)
    steered, bare = (score_outlines(draw, 40, moved=True) for draw in (drawers.outlines, drawers.alone))
    assert steered["iou"] > 0.8 > 0.4 > bare["iou"]
    like, bare = (score_references(draw, 40) for draw in (drawers.references, drawers.alone))
    assert min(like["color"], like["shape"]) >= 0.85 and max(bare["color"], bare["shape"]) < 0.4
    assert sheet(drawers).size == (1648, 560)
