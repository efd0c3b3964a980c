"""A wheel of this tree, in an empty environment with the base dependencies alone, draws."""

from __future__ import annotations

import subprocess
import sys
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
