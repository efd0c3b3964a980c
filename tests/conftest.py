"""Checkpoints and bundles that tests share; each is made once a run, by the real exporter.

With several workers (`pytest -n 2`) each has a processor of its own: two that share all of them are slower than one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER:  # before anything counts the processors
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(WORKER.removeprefix("gw")) % len(processors)]})
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
PICO = REPOSITORY / "examples" / "pico"


_MANY = 1000
_SHARED = {
    "gw0": ("pico", "pico+control+union+image-plus", "sdxl-refiner-small"),
    "gw1": ("sdxl-small", "sd15-small", "flux-dev-small"),
}


def _once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made by the worker that needs it first while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER else own


@pytest.fixture(scope="session")
def checkpoint_of(shared: Path) -> Callable[[str], Path]:
    """The diffusers folder of pico, of a name in `examples.random_checkpoint`, or what is beside one."""

    def get(name: str) -> Path:
        from diffoundry.examples import random_checkpoint, random_transformer
        from diffoundry.parity.pipelines import LORA, TRANSFORMERS, lora_file, make_beside

        plain = name.partition("+")[0]
        if plain != name:
            folder = shared / "checkpoints" / name
            folder = lora_file(folder) if LORA in name else folder
            return _once(folder, lambda path: make_beside(get(plain), name, path))
        make = (random_transformer if name in TRANSFORMERS else random_checkpoint).make
        return PICO if name == "pico" else _once(shared / "checkpoints" / name, lambda path: make(name, path))

    return get


@pytest.fixture(scope="session")
def bundle_of(shared: Path, checkpoint_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """The compiled bundle of a checkpoint; `+control` behind its name is two ControlNets, `+image-KIND` an adapter.

    Do not change it: use `copied` for that.
    """

    def get(name: str) -> Path:
        import diffoundry
        from diffoundry.parity.pipelines import LORA, beside

        if LORA in name:
            return checkpoint_of(name)
        plain, more = name.partition("+")[0], beside(checkpoint_of, name)

        def make(path: Path) -> None:
            work = path.with_name(f"{name}.making")
            if plain != name:
                shutil.copytree(get(plain), work)  # nothing is traced twice
            diffoundry.compile(checkpoint_of(plain), work, **more)
            work.rename(path)

        return _once(shared / "bundles" / name, make)

    return get


@pytest.fixture(scope="session", autouse=True)
def made_first(request: pytest.FixtureRequest, bundle_of: Callable[[str], Path]) -> None:
    """In a run of all tests the workers share the largest bundles: one that waited for the other would do nothing."""
    if len(request.session.items) > _MANY:
        for name in _SHARED.get(WORKER, ()):
            bundle_of(name)


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
        return subprocess.run(line, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]

    return run


@pytest.fixture
def called(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `command`, in this process: for refusals, which else spend their time on loading torch again."""
    folder = tmp_path_factory.mktemp("cwd")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        from diffoundry.cli import main

        line = ["diffoundry", *(str(argument) for argument in arguments)]
        monkeypatch.setattr(sys, "argv", line)
        monkeypatch.chdir(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        written = capfd.readouterr()
        return subprocess.CompletedProcess(line, int(left.value.code or 0), written.out, written.err)

    return run


@pytest.fixture
def simulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for cuda-python, in place of it. No GPU was opened before."""
    from diffoundry.engines.gpu import device, gpu
    from diffoundry.tests.engines.tensorrt.simulated import SimulatedCuda

    simulated = SimulatedCuda()
    monkeypatch.setattr(device, "bindings", lambda: simulated)
    monkeypatch.setattr(gpu, "_OPEN", weakref.WeakSet())
    return simulated


@pytest.fixture
def trt(simulated_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the TensorRT modules, in place of both."""
    from diffoundry.engines.tensorrt.backend import Backend
    from diffoundry.tests.engines.tensorrt.simulated import SimulatedTensorRT

    module = SimulatedTensorRT(simulated_cuda)
    monkeypatch.setattr(Backend, "load", lambda backend: module)
    return module


@pytest.fixture
def simulated_sessions(simulated_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sessions of ONNX Runtime's CUDA provider on the simulated GPU; the list is of those that were made."""
    from diffoundry.engines import onnxruntime, onnxruntime_cuda
    from diffoundry.tests.engines.simulated_session import SimulatedSession

    made: list[Any] = []

    def open_session(path: Path, options: Any, provider: str, component: str, chosen: Any, changed: Any = ()) -> Any:
        ((name, given),) = chosen
        assert (provider, name) == ("cuda", "CUDAExecutionProvider")
        made.append(SimulatedSession(path, simulated_cuda, given))
        return made[-1]

    monkeypatch.setattr(onnxruntime_cuda, "open_session", open_session)
    monkeypatch.setattr(onnxruntime_cuda, "nodes_elsewhere", lambda session, provider: "")
    monkeypatch.setattr(onnxruntime_cuda, "require_version", lambda: None)
    monkeypatch.setattr(onnxruntime, "require_provider", lambda provider: provider)
    return made
