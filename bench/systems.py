"""A system in a process of its own, asked a JSON object a line on its standard input, with as many answers.

Ours is `worker.py`, those of others are in `peers/`. What a process says on standard error is kept for messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from ..common.errors import BenchError
from ..common.machine import peak_memory
from .report import OURS

START_S, LOAD_S, DRAW_S, END_S = 600.0, 3600.0, 3600.0, 30.0
"""Seconds that a system may take to import what it needs, to load (and convert) a model, to draw, and to end."""
_LONGEST_SHOWN = 200
_NOISE = ("^", "~", "warning", "  ")


def command_of(name: str) -> list[str]:
    """The command line of the process of a system. Raises `BenchError` when its environment is missing."""
    if name == OURS:
        return [sys.executable, "-m", f"{__package__}.worker"]
    from . import peers

    return peers.command(name)


def remedy(name: str) -> str:
    """What mends the environment of a peer, to be added to what it fails with."""
    return f"; `diffoundry bench --setup {name}` tries its environment, and makes it anew where it does not start"


class Process:
    """A system that runs. started: Unix time just before. ready_s: seconds until its imports were done."""

    def __init__(self, name: str, command: Sequence[str], timeout: float = START_S) -> None:
        """Start it and wait until it is ready. Raises `BenchError` when it does not start."""
        self.name, self._ended = name, False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.started = time.time()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                start_new_session=True,  # an interrupt is ours to answer, and its children end with it
            )
        except OSError as error:
            self._said.close()
            raise BenchError(f"{name} does not start: {command[0]}: {error.strerror}") from None
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        try:
            ready = self._answer("start", timeout)
            self.ready_s = time.time() - self.started
            if ready.get("ready") is not True:
                raise BenchError(f"{name} did not say that it is ready, but {_short(json.dumps(ready))}")
        except BaseException:
            self.kill()
            raise
        versions = ready.get("versions")
        self.versions = {str(key): str(each) for key, each in versions.items()} if isinstance(versions, dict) else {}

    def ask(self, do: str, timeout: float, **message: Any) -> dict[str, Any]:
        """The answer to one question, which may take `timeout` seconds.

        Raises `BenchError` for a refusal, and when it crashes, hangs or talks nonsense; then it is ended.
        """
        if self._ended:
            raise BenchError(f"{self.name} has ended")
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: what comes in place of an answer says how
            self._process.stdin.write(json.dumps({"do": do, **message}).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer(do, timeout)
        if answer.get("ok") is not True:
            raise BenchError(f"{self.name}: {_short(str(answer.get('error', 'no reason given')))}")
        return answer

    def end(self) -> dict[str, Any]:
        """End it. Returns `peak_rss` and `peak_gpu`, bytes or None."""
        seen = peak_memory(self._process.pid)
        answer: dict[str, Any] = {}
        with contextlib.suppress(BenchError):
            answer = self.ask("end", END_S)
        self.kill()
        return {"peak_rss": _bytes(answer.get("peak_rss")) or seen, "peak_gpu": _bytes(answer.get("peak_gpu"))}

    def kill(self) -> None:
        """End it, and all that it started, at once."""
        self._ended = True
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _answer(self, do: str, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            raise BenchError(f"{self.name} gave no answer to {do!r} in {timeout:.0f} s and was ended") from None
        if not line:
            code = self._process.wait()
            said = _last_words(self._said)
            self.kill()
            raise BenchError(f"{self.name} ended in {do!r} with {_named(code)}{f': {said}' if said else ''}")
        try:
            answer = json.loads(line)
            if not isinstance(answer, dict):
                raise ValueError
        except (ValueError, RecursionError):
            self.kill()
            shown = _short(line.decode(errors="replace"))
            raise BenchError(f"{self.name} answered {do!r} with what is no JSON object: {shown!r}") from None
        return answer


@contextmanager
def running(name: str, command: Sequence[str] | None = None) -> Iterator[Process]:
    """A process of the system `name`, which is ended with the block. Raises `BenchError`."""
    try:
        process = Process(name, command_of(name) if command is None else command)
    except BenchError as error:
        again = "" if name == OURS or command is not None or "--setup" in str(error) else remedy(name)
        raise BenchError(f"{error}{again}") from None
    try:
        yield process
    finally:
        process.kill()


def _read(stream: IO[bytes], answers: queue.SimpleQueue[bytes]) -> None:
    """Put every line into the queue, and at the end b""."""
    with contextlib.suppress(OSError, ValueError):  # closed
        for line in stream:
            answers.put(line)
    answers.put(b"")


def _last_words(said: IO[bytes]) -> str:
    """The last line on standard error that looks like a reason."""
    with contextlib.suppress(OSError, ValueError):
        said.seek(max(0, said.seek(0, os.SEEK_END) - 10_000))
        lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if not line.lower().startswith(_NOISE)]
        return _short((telling or lines or [""])[-1])
    return ""


def _named(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in signal.Signals.__members__.values() else str(-code)
    more = " (it may have run out of memory)" if -code == signal.SIGKILL else ""
    return f"signal {name}{more}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_SHOWN else f"{line[:_LONGEST_SHOWN]}…"


def _bytes(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
