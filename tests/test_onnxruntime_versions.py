"""The oldest ONNX Runtime that is allowed, one between, the wheel for GPUs (on its CPU provider), and the newest."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffoundry.tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
DRAW = ("a large red star", "--steps", "4", "--seed", "3", "--guidance", "4")


@pytest.fixture(
    scope="module", params=["onnxruntime==1.22.1", "onnxruntime==1.24.4", "onnxruntime-gpu==1.31.1", "onnxruntime"]
)
def python(request, tmp_path_factory):
    """Runs an interpreter that has this wheel alone of ONNX Runtime, and all else that the tests have."""
    root = tmp_path_factory.mktemp("versions")
    own, others = root / "own", root / "others"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(own), request.param], check=True)
    others.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("onnxruntime", "__editable__", "diffoundry")):
            (others / path.name).symlink_to(path)
    (others / "diffoundry").symlink_to(REPOSITORY)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)

    def run(*arguments, own=own):
        line = [str(root / "venv" / "bin" / "python"), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (own, others)))}
        return subprocess.run(line, capture_output=True, text=True, cwd=root, env=environment)

    run.requirement = request.param
    return run


def test_it_compiles_draws_and_verifies(python, bundle_of, command, tmp_path):
    found = python(
        "-c", "import importlib.metadata as m, onnxruntime as o; print(o.__version__); m.version('onnxruntime')"
    )
    name, _, version = python.requirement.partition("==")
    assert found.stdout.strip().startswith(version)
    assert (found.returncode == 0) == (name == "onnxruntime")  # of the other wheel no such distribution is known
    bundle = tmp_path / "b"
    compiled = python(
        "-m", "diffoundry", "compile", REPOSITORY / "examples" / "pico", "-o", bundle, "--tasks", "txt2img"
    )
    assert compiled.returncode == 0, compiled.stderr
    drawn = python("-m", "diffoundry", "run", bundle, *DRAW, "-o", tmp_path / "own.png")
    assert drawn.returncode == 0, drawn.stderr
    verified = python("-m", "diffoundry", "verify", bundle)
    assert verified.returncode == 0, verified.stderr
    assert command("run", bundle_of("pico"), *DRAW, "-o", tmp_path / "base.png").returncode == 0
    own, base = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("own", "base"))
    assert np.abs(own - base).max() <= 1


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.parametrize("verb", ["run", "compile"])
def test_an_engine_that_cannot_start_is_one_line_before_any_work(python, bundle_of, verb, provider, tmp_path):
    what = (bundle_of("pico"), *DRAW) if verb == "run" else (REPOSITORY / "examples" / "pico",)
    done = python("-m", "diffoundry", verb, *what, "--engine", f"onnxruntime:{provider}", "-o", tmp_path / "a.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: provider '{provider}' ")
    assert done.stderr.count("\n") == 1
    gpu = "gpu" in python.requirement
    assert ("did not start" if gpu else "is not in this ONNX Runtime") in done.stderr
    assert ("pip install onnxruntime-gpu" in done.stderr) != gpu
    assert not list(tmp_path.iterdir())


def test_what_one_wheel_leaves_of_the_other_is_named(python, bundle_of, tmp_path):
    """Both were installed, and one was uninstalled: a folder `onnxruntime` without the module is left."""
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    done = python("-m", "diffoundry", "verify", bundle_of("pico"), own=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ONNX Runtime is there in part only: run `pip uninstall onnxruntime onnxrun")
    assert done.stderr.count("\n") == 1
