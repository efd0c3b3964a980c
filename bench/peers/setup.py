"""`bench --setup`: the environment of a peer, from versions that were tried."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from ...common.errors import BenchError, reason
from ...common.files import exclusive, write_json
from ...common.progress import Meter, Progress
from .peer import WHOLE, Peer, home, named

_PIP = ("-E", "-s", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet")
_START_S, _LONGEST = 600.0, 300
_CUDA = ("nvidia-", "cuda-")
"""How the names of wheels begin that bring CUDA's libraries."""
_NVIDIA = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


def setup(name: str, progress: Progress | None = None) -> Path:
    """Make the environment of a peer, where none stands that starts. Returns its folder.

    Raises `BenchError` for an unknown peer, when pip fails, or when pip would bring CUDA's libraries to a machine that
    has no GPU for them. What was half made is removed, and what was made from other requirements before.
    """
    peer, meter = named(name), Meter(progress, 4)
    try:
        home().mkdir(parents=True, exist_ok=True)
        with exclusive(home() / f"{peer.environment}.lock"):
            if not _stands(peer, name, meter):
                _make(peer, name, meter)
                _remove_others(peer)
    except OSError as error:
        raise BenchError(f"the environment of {name} cannot be made in {home()}: {reason(error)}") from None
    meter.end()
    return peer.folder


def _stands(peer: Peer, name: str, meter: Meter) -> bool:
    """Whether the environment was made and still starts."""
    if not (peer.folder / WHOLE).is_file():
        return False
    meter.show("try it")
    try:
        _try(peer, name)
    except (BenchError, OSError):
        return False
    return True


def _make(peer: Peer, name: str, meter: Meter) -> None:
    folder = peer.folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        meter.show("make an environment")
        try:
            venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        except subprocess.CalledProcessError as error:
            said = last_words((error.output or b"").decode(errors="replace"))
            raise BenchError(
                f"{name}: this Python makes no environment ({said}): make room on the disk, or install its venv and "
                "ensurepip"
            ) from None
        meter.step()
        meter.show("find wheels")
        if not _has_gpu():
            _refuse_cuda(peer, name)
        meter.step()
        meter.show("install wheels")
        _pip(peer, name, ["-r", str(peer.requirements)])
        if peer.bare_requirements.is_file():
            _pip(peer, name, ["--no-deps", "-r", str(peer.bare_requirements)])
        meter.step()
        meter.show("try it")
        _try(peer, name)
        write_json(folder / WHOLE, {"environment": peer.environment, "python": sys.version.split()[0]})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_cuda(peer: Peer, name: str) -> None:
    """Raise `BenchError` where pip would install CUDA's libraries, before it has fetched them."""
    with tempfile.TemporaryDirectory(prefix="diffoundry-") as scratch:
        path = Path(scratch) / "report.json"
        _pip(peer, name, ["--dry-run", "--report", str(path), "-r", str(peer.requirements)])
        found = json.loads(path.read_text(encoding="utf-8")).get("install", [])
    wheels = sorted({str(each["metadata"]["name"]).lower() for each in found})
    if any(wheel.startswith(_CUDA) for wheel in wheels):
        raise BenchError(
            f"{name}: pip would install torch with several GB of CUDA's libraries, and there is no NVIDIA GPU here: "
            "put the index of CPU builds that PyTorch's installation page names into the environment variable "
            "PIP_EXTRA_INDEX_URL and run the same command again"
        )


def _has_gpu() -> bool:
    return any(Path(each).exists() for each in _NVIDIA) or shutil.which("nvidia-smi") is not None


def _pip(peer: Peer, name: str, arguments: Sequence[str]) -> None:
    done = subprocess.run([str(peer.python), *_PIP, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise BenchError(f"{name}: pip failed: {last_words(done.stderr)}")


def _try(peer: Peer, name: str) -> None:
    """Start the peer, which ends where there is no question. Raises `BenchError` when an import of it fails."""
    try:
        done = subprocess.run(
            peer.command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_START_S,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{name} was installed and did not start in {_START_S:.0f} s") from None
    if done.returncode != 0:
        raise BenchError(f"{name} was installed and does not start: {last_words(done.stderr)}")


def _remove_others(peer: Peer) -> None:
    """Remove environments of the same name that were made from other requirements."""
    for folder in home().glob(f"{peer.environment}-*"):
        if folder != peer.folder and set(folder.name[len(peer.environment) + 1 :]) <= set("0123456789abcdef"):
            shutil.rmtree(folder, ignore_errors=True)


def last_words(said: str) -> str:
    """The last line on standard error that looks like a reason: one that begins with "error" before any other."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    others = [line for line in lines if not line.lower().startswith(("warning", "[notice]"))]
    return ([*errors[-1:], *others[-1:]] or ["it says nothing"])[0].removeprefix("ERROR: ")[:_LONGEST]
