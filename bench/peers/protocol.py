"""What each peer's script shares: the questions of `bench/systems.py` answered, a JSON object a line, with times.

The scripts run in environments that have no diffoundry: this file needs the standard library and numpy, and is imported
by its path.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Asked = Mapping[str, Any]
"""A question, as the parent wrote it."""
_LONGEST = 300


class Refused(Exception):
    """What was asked is beyond this system; the message says why, and what it can do."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready. info: what runs it. convert_s: the part of the time that made files in `work`."""

    info: dict[str, Any] = field(default_factory=dict)
    convert_s: float = 0.0


class Clock:
    """When a picture began, when each of its steps ended, and when it was there; in seconds of `perf_counter`."""

    def __init__(self) -> None:
        self._unix = time.time() - time.perf_counter()
        self.start()

    def start(self) -> None:
        """The call begins now."""
        self._ends: list[float] = []
        self._stopped: float | None = None
        self._began = time.perf_counter()

    def step(self) -> None:
        """A step has ended."""
        self._ends.append(time.perf_counter())

    def stop(self) -> None:
        """The pictures are there."""
        self._stopped = time.perf_counter()

    def answer(self) -> dict[str, Any]:
        """`seconds`, `stages` and `at` of the protocol; null for what is not known."""
        end = time.perf_counter() if self._stopped is None else self._stopped
        ends = self._ends
        first = ends[0] if ends else None
        stages = {
            "before": None,
            "first_step": None if first is None else first - self._began,
            "steps": [late - early for early, late in pairwise(ends)],
            "after": end - ends[-1] if ends else None,
        }
        at = {"first_step": None if first is None else self._unix + first, "end": self._unix + end}
        return {"seconds": end - self._began, "stages": stages, "at": at}


class System(Protocol):
    """What a script has to offer."""

    def load(self, asked: Asked) -> Loaded:
        """Load a model; one that was loaded before is dropped. Raises `Refused`."""

    def draw(self, asked: Asked, latents: Array, clock: Clock) -> Array:
        """Pictures, uint8 (n, H, W, 3). The clock is started and stopped around the call alone. Raises `Refused`."""

    def peak_gpu(self) -> int | None:
        """The most bytes of a GPU that were in use, None where there is none."""


def serve(imports: Callable[[], System], packages: tuple[str, ...]) -> None:
    """Answer the questions on standard input until it ends, or is told to.

    imports: imports what is needed. packages: the distributions whose versions are given.
    """
    # a library may print, from C++ too: its words must not come among the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    start = time.perf_counter()
    system = imports()
    say({"ready": True, "seconds": {"import": time.perf_counter() - start}, "versions": _versions(packages)})
    loaded = False
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "end":
            say({"ok": True, "peak_rss": _peak_rss(), "peak_gpu": system.peak_gpu()})
            return
        try:
            if asked["do"] == "load":
                loaded = False
                answer = _load(system, asked)
                loaded = True
            elif not loaded:
                raise Refused("nothing was loaded")
            else:
                answer = _draw(system, asked)
        except Refused as error:
            answer = _failed(str(error))
        except MemoryError:
            answer = _failed("out of memory")
        except OSError as error:
            answer = _failed(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        except Exception as error:  # whatever a library raises: the next question may do
            answer = _failed(f"{type(error).__name__}: {error}")
        say(answer)


def _load(system: System, asked: Asked) -> dict[str, Any]:
    start = time.perf_counter()
    loaded = system.load(asked)
    seconds = {"load": time.perf_counter() - start - loaded.convert_s}
    if loaded.convert_s:
        seconds["convert"] = loaded.convert_s
    return {"ok": True, "seconds": seconds, "info": loaded.info}


def _draw(system: System, asked: Asked) -> dict[str, Any]:
    latents: Array = np.load(asked["latents"], allow_pickle=False)
    clock = Clock()
    images = system.draw(asked, latents, clock)
    answer = clock.answer()
    file = io.BytesIO()
    np.save(file, images)
    Path(asked["image"]).write_bytes(file.getvalue())  # NumPy's own writing does not say that a disk is full
    return {"ok": True, **answer}


def _failed(why: str) -> dict[str, Any]:
    line = " ".join(why.split())
    return {"ok": False, "error": line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"}


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _peak_rss() -> int:
    """Bytes. `resource` is second choice: on Linux it counts what the parent had when it started this process."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def generators(torch: Any, asked: Asked, latents: Array) -> list[Any]:
    """torch's generators of the pictures, as they are after the latents were drawn: a step may draw more."""
    made = [torch.Generator().manual_seed(asked["seed"] + i) for i in range(asked["count"])]
    for generator in made:
        torch.randn(1, *latents.shape[1:], generator=generator)
    return made


def checkpoint_of(asked: Asked) -> str:
    """The folder of the checkpoint. Raises `Refused` when none was given."""
    if not asked.get("checkpoint"):
        raise Refused("it reads a checkpoint: give its folder with --checkpoint")
    return str(asked["checkpoint"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `Refused` naming the file when it is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} is no JSON object")
    return value


def scheduler_config(asked: Asked, folder: str) -> dict[str, Any]:
    """The scheduler configuration of a model folder, with the class and the options that were asked for laid over."""
    config = read_json(Path(folder, "scheduler", "scheduler_config.json"))
    if asked.get("scheduler_class"):
        config |= {"_class_name": asked["scheduler_class"], **asked.get("scheduler_options", {})}
    return config


def device_of(asked: Asked, known: tuple[str, ...] = ("cpu",)) -> str:
    """What the model is to run on, "cpu" where nothing was said. Raises `Refused` for one that is not in `known`."""
    device = str(asked.get("device") or "cpu")
    if device not in known:
        raise Refused(f"it runs on {' or '.join(known)} here, not on {device}")
    return device


def precision_of(asked: Asked, known: tuple[str, ...]) -> str:
    """The precision asked for. Raises `Refused` for one that is not in `known`."""
    precision = str(asked.get("precision") or "fp32")
    if precision not in known:
        raise Refused(f"it runs in {' or '.join(known)}, not in {precision}: choose another --precision")
    return precision
