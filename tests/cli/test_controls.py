"""The options of `run` that make controls and image prompts: how names go together, and what is refused."""

from __future__ import annotations

import click
import numpy as np
import pytest

from diffoundry.cli.controls import read_controls, read_image_prompts


def test_pictures_of_a_union_are_named_with_their_modes():
    pictures = ("union:depth=a.png", "union:3=b.png", "edge=c.png")
    found = read_controls(pictures, ("union:depth=0.5",), ("union:3=0:0.5",), False, ())
    assert [(each.name, each.mode, each.image, each.scale, each.interval) for each in found] == [
        ("union", "depth", "a.png", 0.5, (0.0, 1.0)),
        ("union", "3", "b.png", 1.0, (0.0, 0.5)),
        ("edge", None, "c.png", 1.0, (0.0, 1.0)),
    ]


@pytest.mark.parametrize(
    ("pictures", "scales", "problem"),
    [
        (("union:depth=a.png",), ("union=0.5",), "union is none of the controls that are given: union:depth"),
        (("edge=a.png",), ("depth=0.5",), "--control-scale depth goes with --control depth=PICTURE"),
        ((":depth=a.png",), (), "has no name: give NAME=PICTURE, or NAME:MODE=PICTURE"),
    ],
)
def test_names_that_do_not_go_together_are_refused(pictures, scales, problem):
    with pytest.raises(click.UsageError, match=problem):
        read_controls(pictures, scales, (), False, ())


def test_scales_and_masks_are_of_the_only_adapter_that_is_named():
    for image, other in (("look=a.png", "b.png"), ("a.png", "look=b.png"), ("look=a.png", "look=b.png")):
        scale = "look=0.5" if other.startswith("look") else "0.5"
        [found] = read_image_prompts((image,), (), (scale,), (other,))
        assert (found.name, found.images, found.masks, found.scale) == (
            "look",
            ["a.png"],
            ["b.png"],
            0.5,
        )


def test_what_is_for_an_adapter_without_images_is_not_taken_for_another():
    for scales, said in ((("foo=0.2",), None), (("0.2", "look=0.9"), "given twice for look")):
        if said is None:
            [found] = read_image_prompts(("a.png",), (), scales, ())
            assert found.name == "foo"  # which the bundle then lacks
            continue
        with pytest.raises(click.UsageError, match=said):
            read_image_prompts(("a.png",), (), scales, ())
    with pytest.raises(click.UsageError, match="goes with --ip-image foo=PICTURE"):
        read_image_prompts(("look=a.png",), (), ("foo=0.2",), ())


def test_negative_images_are_of_the_adapter_that_is_named():
    [found] = read_image_prompts(("look=a.png", "look=b.png"), (), (), (), ("c.png",))
    assert found.negatives == ["c.png"] and found.name == "look"
    with pytest.raises(click.UsageError, match=r"--ip-negative c\.png goes with --ip-image mood=PICTURE"):
        read_image_prompts(("look=a.png",), (), (), (), ("mood=c.png",))


def test_embeddings_are_read_from_a_file(tmp_path):
    path = tmp_path / "face.npy"
    np.save(path, np.ones((2, 5)))
    [found] = read_image_prompts((), (f"look={path}",), ("0.5",), ())
    assert found.embeds.shape == (2, 5) and found.embeds.dtype == np.float32 and found.scale == 0.5
    np.savez(tmp_path / "many.npz", a=np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "none.npy", np.ones(()))
    (tmp_path / "cut.npy").write_bytes(path.read_bytes()[:40])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, problem in (
        ("there.npy", "does not exist: give a .npy file"),
        ("many.npz", "holds no numbers"),
        ("objects.npy", "is no .npy file of numbers"),
        ("none.npy", "holds no numbers"),
        ("cut.npy", "is no .npy file of numbers"),
        ("empty.npy", "is no .npy file of numbers"),
    ):
        with pytest.raises(click.UsageError, match=problem):
            read_image_prompts((), (str(tmp_path / name),), (), ())
    with pytest.raises(click.UsageError, match="beside other images for the same IP-Adapter"):
        read_image_prompts(("a.png",), (str(path),), (), ())
    with pytest.raises(click.UsageError, match="is given 1 times, --ip-image PICTURE 2 times: give each image a mask"):
        read_image_prompts(("a.png", "b.png"), (), (), ("c.png",))
