"""The short scripts in `examples/` do what they say."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import diffoundry
from diffoundry.tests.conftest import REPOSITORY


def run(name, bundle, folder):
    line = [sys.executable, REPOSITORY / "examples" / name, bundle]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("first_image.py", ["first.png"]),
        ("batch.py", ["ring.png", "star.png"]),
        ("previews.py", ["step-10.png", "step-15.png", "step-20.png", "step-5.png"]),
    ],
)
def test_a_script_draws(name, pictures, bundle_of, tmp_path):
    run(name, bundle_of("pico"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == pictures
    for path in tmp_path.iterdir():
        assert Image.open(path).size == (64, 64)


def test_the_last_preview_is_the_picture(bundle_of, tmp_path):
    run("previews.py", bundle_of("pico"), tmp_path)
    whole = diffoundry.load(bundle_of("pico"))("a large red star", seed=7, steps=20).images[0]
    last = np.asarray(Image.open(tmp_path / "step-20.png"), int)
    assert np.abs(last - np.asarray(whole)).max() <= 1  # the script rounds down


def test_a_callback_counts_and_stops(bundle_of, tmp_path):
    *counted, end = run("callback.py", bundle_of("pico"), tmp_path)
    assert counted == [f"{step} of 20" for step in range(1, 6)]
    assert end == "stopped by the callback after step 5 of 20"


@pytest.mark.slow
def test_plans_are_built_for_cards_that_are_not_here(bundle_of, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    bundle = shutil.copytree(bundle_of("pico"), tmp_path / "pico.bundle")
    assert run("build_elsewhere.py", bundle, tmp_path)[-1] == "tensorrt-rtx fp16"
