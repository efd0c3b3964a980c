"""`run` and `compile` with the options of the image tasks, as a user types them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import diffoundry

PROMPT = "a large red star at the left on a navy background"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """image.jpg lies on its side and is turned by its EXIF orientation; mask.png is of the upright size."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "image.jpg", exif=exif, quality=95)
    mask = Image.new("L", (64, 48))
    mask.paste(255, (16, 16, 48, 32))
    mask.save(folder / "mask.png")
    return folder


def test_a_picture_is_inpainted_and_the_record_says_how(command, bundle_of, pictures, tmp_path):
    out = tmp_path / "o.png"
    image, mask = pictures / "image.jpg", pictures / "mask.png"
    options = ["--image", image, "--mask", mask, "--strength", 0.5, "--steps", 4, "--seed", 3, "-o", out, "--json"]
    done = command("run", bundle_of("pico"), PROMPT, *options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["request"]
    assert (told["strength"], told["width"], told["height"]) == (0.5, 64, 48)
    record = json.loads(Image.open(out).text["diffoundry"])
    assert (record["image"], record["mask"]) == (str(image), str(mask))
    pipe = diffoundry.load(bundle_of("pico"))
    again = pipe(PROMPT, image=image, mask=mask, strength=0.5, steps=4, seed=3)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(again.images[0]))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--refine-from", "0.5"], 2, "--refine-from goes with --refiner"),
        (["--mask", "m.png"], 1, "mask has no effect without an image"),
        (["--image", "none.png"], 1, "none.png"),
        (["--strength", "0.5"], 1, "strength has no effect without an image"),
        (["--preview", "p.png"], 1, "no tiny decoder: compile the checkpoint again with --component vae_tiny=FOLDER"),
        (["--decoder", "huge"], 2, "huge"),
        (["--preview", "o.png", "-o", "o.png"], 2, "--preview and --output are one file"),
        (["--original-size", "5", "5"], 1, "has no effect on this model"),
        (["--prompt-2", "a ring"], 1, "no second text encoder"),
    ],
)
def test_wrong_options_are_one_line(command, bundle_of, tmp_path, options, code, message):
    done = command("run", bundle_of("pico"), PROMPT, "--steps", 1, "-o", tmp_path / "o.png", *options)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tasks", "upscale"], 1, "cannot do the task upscale"),
        (["--component", "unet"], 2, "--component takes NAME=FOLDER_OR_FILE, found 'unet'"),
        (["--component", "unet=/none"], 1, "/none is no folder"),
        (["--component", "unet="], 2, "--component takes NAME=FOLDER_OR_FILE, found 'unet='"),
        (["--config", "x"], 1, "goes with a single file"),
    ],
)
def test_wrong_options_of_compile_are_one_line(called, checkpoint_of, tmp_path, options, code, message):
    done = called("compile", checkpoint_of("pico"), "-o", tmp_path / "b", *options)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
