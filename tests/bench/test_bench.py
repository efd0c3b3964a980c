"""The benchmarks run, and print figures that can be: what they measure is nobody's test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PICO = Path(__file__).parents[2] / "examples" / "pico"


def printed(module, *options):
    done = subprocess.run(
        [sys.executable, "-m", f"diffoundry.bench.{module}", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pico_against_its_peers(bundle_of):
    assert re.search(r"\d", printed("pico", PICO, bundle_of("pico")))


@pytest.mark.parametrize("module", ["startup", "step"])
def test_start_and_step(module, bundle_of):
    assert re.search(r"\d+(\.\d+)? (s|us)\b", printed(module, bundle_of("pico")))


def test_the_weights_of_a_large_bundle_are_those_of_its_models(bundle_of):
    shown = printed("large", bundle_of("pico"), "--side", "64", "--steps", "2")
    folders = [bundle_of("pico") / name for name in ("text_encoder", "unet", "vae_decoder")]
    weights = sum(path.stat().st_size for folder in folders for path in folder.glob("model.onnx*"))
    assert f"weights {weights / 2**30:.2f} GiB" in shown
