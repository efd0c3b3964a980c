"""optimum reads our bundles and we read its exports. It needs transformers 4, hence an environment of its own.

DIFFOUNDRY_OPTIMUM_PYTHON names the interpreter of one that is there already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffoundry.runtime.pipeline import load

pytestmark = pytest.mark.slow
PROMPT = "a large red star at the left on a navy background"
THEIRS = """
import sys, numpy, torch
from optimum.onnxruntime import ORTDiffusionPipeline
pipeline = ORTDiffusionPipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(7)
image = pipeline(sys.argv[3], num_inference_steps=8, generator=generator, output_type="np").images
numpy.save(sys.argv[2], image)
"""


@pytest.fixture(scope="module")
def optimum_python(tmp_path_factory):
    given = os.environ.get("DIFFOUNDRY_OPTIMUM_PYTHON")
    if given:
        return Path(given)
    root = tmp_path_factory.mktemp("optimum")
    subprocess.run([sys.executable, "-m", "venv", root], check=True)
    python = root / "bin" / "python"
    import torch

    version = torch.__version__.split("+")[0]
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={version}"], check=True)
    # pinned, or pip searches for minutes for versions that go together
    packages = ["optimum-onnx[onnxruntime]==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "diffusers==0.39.0"]
    packages += ["huggingface_hub==0.36.2", "accelerate==1.15.0"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


@pytest.mark.parametrize("name", ["pico", "sdxl-small"])
def test_optimum_draws_the_same_image_from_our_bundle(name, optimum_python, bundle_of, tmp_path):
    out = tmp_path / "theirs.npy"
    subprocess.run([optimum_python, "-c", THEIRS, bundle_of(name), out, PROMPT], check=True)
    theirs = np.round(np.load(out)[0] * 255).astype(int)
    ours = np.asarray(load(bundle_of(name))(PROMPT, steps=8, seed=7).images[0]).astype(int)
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("name", ["pico", "sdxl-small"])
def test_we_draw_the_same_image_from_their_export(name, optimum_python, bundle_of, checkpoint_of, command, tmp_path):
    source, exported = shutil.copytree(checkpoint_of(name), tmp_path / "source"), tmp_path / "exported"
    for folder in bundle_of(name).glob("tokenizer*"):  # with the files that transformers 4 wants
        shutil.copytree(folder, source / folder.name, dirs_exist_ok=True)
    module = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"
    line = [optimum_python, "-c", module, "export", "onnx", "--task", "text-to-image"]
    subprocess.run([*line, "--model", source, exported], check=True)
    done = command("run", exported, PROMPT, "--steps", 8, "--seed", 7, "-o", tmp_path / "o.png")
    assert done.returncode == 0, done.stderr
    theirs = load(exported)(PROMPT, steps=8, seed=7, count=2)
    ours = load(bundle_of(name))(PROMPT, steps=8, seed=7, count=2)
    np.testing.assert_allclose(theirs.latents, ours.latents, atol=1e-3, rtol=1e-2)
