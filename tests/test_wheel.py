"""A wheel of this tree, in an empty environment with the base dependencies alone, draws; an sdist makes it too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_wheel_runs_with_the_base_dependencies(tmp_path, bundle_of):
    wheels, python = tmp_path / "wheels", tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", wheels, REPOSITORY], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (wheel,) = wheels.glob("*.whl")
    constraints = REPOSITORY / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel], check=True)
    installed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert not any(line.split()[0] in ("torch", "diffusers", "transformers", "onnx") for line in installed.splitlines())
    command = tmp_path / "env" / "bin" / "diffoundry"
    shown = subprocess.run([command, "--help"], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "compile" in shown
    line = [command, "run", bundle_of("pico"), "a red star", "--steps", "2", "--seed", "1", "-o", tmp_path / "o.png"]
    subprocess.run(line, check=True, cwd=tmp_path)
    assert (tmp_path / "o.png").exists()


def test_the_sdist_is_whole_and_makes_the_same_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    # A copy: setuptools puts what an older tree left in build/lib into a wheel.
    tree, made = tmp_path / "tree", tmp_path / "made"
    made.mkdir()
    unwanted = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", "dist")
    shutil.copytree(REPOSITORY, tree, ignore=unwanted)
    sdist = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", sdist, made], check=True, capture_output=True, cwd=tree)
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    wanted = [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()]
    left_out = (".git", ".hypothesis/", "diffoundry.egg-info/", "build/")
    assert not [name for name in wanted if name not in names and not name.startswith(left_out)]
    wheels = {}
    for name, source in (("tree", tree), ("sdist", archive)):
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", made / name, source]
        subprocess.run(wheel, check=True)
        with zipfile.ZipFile(next((made / name).glob("*.whl"))) as held:
            wheels[name] = {part: held.read(part) for part in held.namelist()}
    assert wheels["sdist"] == wheels["tree"]
    assert not [part for part in wheels["sdist"] if part.split("/")[1] in ("tests", "examples", "parity")]
