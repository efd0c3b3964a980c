"""Checkpoints and bundles that tests share; each is made once a run, by the real exporter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
PICO = REPOSITORY / "examples" / "pico"
CHECKPOINTS = ("pico", "sd15-small", "sd2-small")


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The diffusers folder of a name in `CHECKPOINTS`."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if name == "pico":
            return PICO
        if not (root / name).exists():
            from diffoundry.examples.random_checkpoint import make

            make(name, root / name)
        return root / name

    return get


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """The compiled bundle of a name in `CHECKPOINTS`. Do not change it: use `copied` for that."""
    root = tmp_path_factory.mktemp("bundles")

    def get(name: str) -> Path:
        if not (root / name).exists():
            import diffoundry

            diffoundry.compile(checkpoint_of(name), root / name)
        return root / name

    return get


@pytest.fixture
def copied(tmp_path: Path, bundle_of: Callable[[str], Path]) -> Path:
    """A copy of the pico bundle that a test may damage."""
    return Path(shutil.copytree(bundle_of("pico"), tmp_path / "pico.bundle"))


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `diffoundry ARGS…` in a process and a folder of its own."""
    folder = tmp_path_factory.mktemp("cwd")

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "diffoundry", *(str(argument) for argument in arguments)]
        options = {"cwd": folder, **options}
        return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]

    return run
