"""Build plans into the engine store, each in a process of its own: a builder that dies is an error message."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...common.errors import EngineError
from ...common.files import read_json
from ...common.machine import available_memory, peak_memory
from ..cache import RECORD_NAME, EngineStore
from .backend import BACKENDS
from .layers import Layer, summary
from .plan import PLAN_NAME, Plan, Recipe

LAYERS_NAME = "layers.json"
_POLL_SECONDS = 0.05
_GIB = 2**30

Progress = Callable[[str, float], None]
"""`progress(phase, fraction)` while a plan is built."""


def find(store: EngineStore, recipe: Recipe) -> Plan | None:
    """The plan of `recipe` if it was built before and is whole; what is left of a damaged one is removed."""
    key = store.key(recipe.built_from())
    folder = store.find(key)
    if folder is None:
        return None
    try:
        return Plan.read(store, read_json(folder / RECORD_NAME, "the record"))
    except EngineError:
        store.drop(key)
        return None


def clean(store: EngineStore) -> None:
    """Remove the plans whose records are damaged: nothing would ever load them."""
    for record in store.records():
        if record.get("backend") in BACKENDS:
            try:
                Plan.read(store, record)
            except EngineError:
                store.drop(record["key"])


def build(
    store: EngineStore,
    recipe: Recipe,
    onnx: Path,
    *,
    fp32_nodes: Collection[str] = (),
    timing: Path | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Build `recipe` from the model at `onnx` into the store.

    fp32_nodes: ONNX nodes that are in fp32 on purpose. timing: a file for the timings of kernels, where the backend
    measures any. memory_limit: bytes that the builder may take before it is stopped.
    Raises `EngineError` when the builder fails, crashes or is killed; nothing is left of it then.
    """
    built_from = recipe.built_from()
    key = store.key(built_from)
    started = time.monotonic()
    record = dict(built_from)
    with store.building(key, record) as work:
        job = {
            "backend": recipe.backend,
            "onnx": str(onnx),
            "archs": _capabilities(recipe),
            "at_gpu": bool(recipe.device),
            "profile": asdict(recipe.profile),
            "flags": sorted(recipe.flags),
            "timing": None if timing is None or BACKENDS[recipe.backend].ahead_of_time else str(timing),
            "plan": str(work / PLAN_NAME),
            "layers": str(work / LAYERS_NAME),
        }
        done, peak = _run(f"{recipe.component}, {recipe.profile.name}", job, memory_limit, progress)
        described = json.loads((work / LAYERS_NAME).read_text(encoding="utf-8"))
        layers = [Layer(d["name"], d["kind"], d["precision"], tuple(d["nodes"]), d["tactic"]) for d in described]
        record.update(
            seconds=round(time.monotonic() - started, 2),
            peak_bytes=peak,
            memory=done["memory"],
            warnings=done["warnings"],
            made_of=summary(layers, recipe.precision, done["attentions"], fp32_nodes),
        )
    plan = find(store, recipe)
    if plan is None:
        raise EngineError(f"{recipe.component}: the plan cannot be read back from {store.root}: check the disk")
    return plan


def _capabilities(recipe: Recipe) -> list[str]:
    """What the builder is told to build for: nothing where it knows no other GPU than the one that is here."""
    if not BACKENDS[recipe.backend].ahead_of_time:
        return []
    return ["current"] if recipe.device else list(recipe.archs)


def _run(
    what: str, job: dict[str, Any], memory_limit: int | None, progress: Progress | None
) -> tuple[dict[str, Any], int]:
    """Run the worker; what it found, and its peak memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    module = f"{__package__}.worker"
    with tempfile.TemporaryFile() as words, _started([sys.executable, "-m", module], words, environment) as process:
        memory = _Memory(process, memory_limit)
        last: dict[str, Any] = {}
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                last = json.loads(line)
            if progress is not None and "fraction" in last:
                progress(last["phase"], last["fraction"])
        code = process.wait()
        memory.stop()
        words.seek(0)
        said = words.read().decode(errors="replace").strip().splitlines()
    if code == 0 and "done" in last:
        return last["done"], memory.peak
    raise EngineError(f"{what}: {_failure(code, last, said, memory)}")


@contextmanager
def _started(line: list[str], words: Any, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The worker, which does not outlive the block."""
    process = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, env=environment, cwd=tempfile.gettempdir()
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _failure(code: int, last: dict[str, Any], said: list[str], memory: _Memory) -> str:
    peak = f"{memory.peak / _GIB:.2f} GiB" if memory.peak else "an unknown amount"
    if memory.stopped:
        return (
            f"the builder took {peak} of memory, more than the {memory.limit / _GIB:.2f} GiB allowed: "
            "raise --build-memory, or ask for a smaller --shape or --batch or a lower --precision"
        )
    if code == -signal.SIGKILL:
        free = available_memory()
        left = "" if free is None else f" ({free / _GIB:.1f} GiB are available now)"
        return (
            f"the builder was killed when it had {peak} of memory{left}: the machine most likely ran out of it; "
            "close other programs, ask for a smaller --shape or --batch, or build on a larger machine"
        )
    if "error" in last:
        return f"TensorRT cannot build the plan: {' '.join(str(last['error']).split())}"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    words = f": {said[-1][:300]}" if said else ""
    return f"the builder crashed with {how} at {peak} of memory{words}"


class _Memory:
    """Watches the memory of a process: `peak` is the most it had, and above `limit` bytes it is killed."""

    def __init__(self, process: subprocess.Popen[bytes], limit: int | None) -> None:
        self.limit = limit or 0
        self.peak = 0
        self.stopped = False
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            self.peak = max(self.peak, peak_memory(self._process.pid) or 0)
            if self.limit and self.peak > self.limit:
                self.stopped = True
                self._process.kill()
                return

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()
