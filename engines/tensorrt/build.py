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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ...common.errors import EngineError
from ...common.files import read_json
from ...common.machine import available_memory, peak_memory
from ..cache import RECORD_NAME, EngineStore
from .backend import BACKENDS
from .plan import Plan, Recipe

_WORKER = [sys.executable, "-m", f"{__package__}.worker"]
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
    record = recipe.built_from()
    job = {
        **record,
        "onnx": str(onnx),
        "fp32_nodes": sorted(fp32_nodes),
        "timing": None if timing is None or BACKENDS[recipe.backend].ahead_of_time else str(timing),
    }
    started = time.monotonic()
    with store.building(store.key(record), record) as work:
        done, peak = _run(
            f"{recipe.component}, {recipe.profile.name}", job | {"folder": str(work)}, memory_limit, progress
        )
        record.update(seconds=round(time.monotonic() - started, 2), peak_bytes=peak, **done)
    plan = find(store, recipe)
    if plan is None:
        raise EngineError(f"{recipe.component}: the plan cannot be read back from {store.root}: check the disk")
    return plan


def _run(
    what: str, job: dict[str, Any], memory_limit: int | None, progress: Progress | None
) -> tuple[dict[str, Any], int]:
    """Run the worker; what it found, and its peak memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as messages:
        asked.write(json.dumps(job).encode())
        asked.seek(0)
        with subprocess.Popen(
            _WORKER, stdin=asked, stdout=subprocess.PIPE, stderr=messages, env=environment, cwd=tempfile.gettempdir()
        ) as process:
            memory = _Memory(process, memory_limit)
            try:
                for line in process.stdout or ():
                    with contextlib.suppress(ValueError):
                        last = json.loads(line)
                    if progress is not None and "fraction" in last:
                        progress(last["phase"], last["fraction"])
            except BaseException:
                process.kill()
                raise
            finally:
                memory.stop()
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip().splitlines()
    if process.returncode == 0 and "done" in last:
        return last["done"], memory.peak
    raise EngineError(f"{what}: {_failure(process.returncode, last, said, memory)}")


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
