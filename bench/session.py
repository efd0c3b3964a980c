"""A system that has loaded a model and draws one request again and again: turns, starts, pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..bundle.reader import FieldError, read
from ..common.arrays import Array
from ..common.errors import BenchError
from ..engines.names import OPENVINO, EngineName
from ..runtime.loop.noise import TorchGenerator
from ..runtime.schedulers import find_sampler
from .converted import folder_of
from .report import OURS, Cold, Settings, Stages, Turn
from .systems import DRAW_S, LOAD_S, Process, running

PAUSE_S = 0.05
"""Before each call: the threads of the system that ran before have stopped to spin."""


@dataclass(frozen=True, slots=True)
class Task:
    """What every system is given. checkpoint: of the peers. folder: for latents and pictures.

    latents: the shape of those of one picture, (C, h, w).
    """

    bundle: Bundle
    checkpoint: Path | None
    settings: Settings
    folder: Path
    latents: tuple[int, int, int]

    def load_message(self, name: str, precision: str, engine: str | None = None) -> dict[str, Any]:
        """The question `load` for a system."""
        wanted, root = self.settings, str(self.bundle.root.resolve())
        checkpoint = None if self.checkpoint is None else str(self.checkpoint.resolve())
        config = self.bundle.scheduler_config()
        sampler = None if wanted.scheduler is None else find_sampler(config, wanted.scheduler)[1]
        return {
            "bundle": root,
            "checkpoint": checkpoint,
            "engine": engine if engine is not None or name != OURS else wanted.engine,
            "precision": precision,
            "device": _device(wanted.engine),
            "threads": wanted.threads,
            "width": wanted.width,
            "height": wanted.height,
            "scheduler": wanted.scheduler,
            "scheduler_class": None if sampler is None else sampler.class_name,
            "scheduler_options": {} if sampler is None else dict(sampler.fixed),
        }

    def converted(self, name: str, precision: str) -> Path:
        """The folder in which a peer keeps what it converts."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint.resolve())
        return folder_of(name, precision, checkpoint, self.bundle.manifest.source)

    def draw_message(self, count: int, image: Path) -> dict[str, Any]:
        """The question `draw`: `count` pictures, of the seeds from the first one on."""
        wanted = self.settings
        return {
            "prompt": wanted.prompt,
            "negative_prompt": wanted.negative_prompt,
            "seed": wanted.seed,
            "latents": str(self._latents_file(count)),
            "steps": wanted.steps,
            "guidance": wanted.guidance,
            "width": wanted.width,
            "height": wanted.height,
            "count": count,
            "image": str(image),
        }

    def _latents_file(self, count: int) -> Path:
        path = self.folder / f"latents-{count}.npy"
        if not path.is_file():
            np.save(path, first_latents(self.settings.seed, count, self.latents))
        return path


def _device(engine: str) -> str:
    """Where our engine runs, as PyTorch calls it: peers run there too."""
    name = EngineName.parse(engine)
    if name.on_cpu:
        return "cpu"
    return name.provider if name.backend == OPENVINO else "cuda"


def first_latents(seed: int, count: int, shape: tuple[int, int, int]) -> Array:
    """What torch's generators on the CPU give for `seed`, `seed + 1` and so on: float32 (count, *shape)."""
    return np.concatenate([TorchGenerator(seed + i).randn(1, *shape) for i in range(count)])


@dataclass(frozen=True, slots=True)
class Drawn:
    """An answer to `draw`. first_step, end: Unix times. calls: of our components, see `drawing.Drawer`."""

    turn: Turn
    first_step: float | None
    end: float
    calls: list[dict[str, Any]] = field(default_factory=list)


class Session:
    """A process that has loaded. loaded: Unix time. info: what it says of itself. convert_s: what converting took.

    seconds: what its last picture took.
    """

    def __init__(self, process: Process, task: Task, precision: str, engine: str | None = None) -> None:
        """Load the model. Raises `BenchError`."""
        self._process, self._task = process, task
        message = task.load_message(process.name, precision, engine)
        if process.name != OURS:
            message["work"] = str(task.converted(process.name, precision))
        answer = process.ask("load", LOAD_S, **message)
        self.loaded = time.time()
        self.name = process.name
        self.info = answer["info"] if isinstance(answer.get("info"), dict) else {}
        self.convert_s = _number(_part(answer, "seconds").get("convert")) or 0.0
        self.seconds = 0.0
        self.image = task.folder / f"{process.name}-{precision}-{engine or ''}.npy".replace(":", "-")

    def draw(self, count: int, *, by_step: bool = False, pause: bool = True) -> Drawn:
        """Draw `count` pictures into `image`. Raises `BenchError`.

        by_step: have the end of the first step told, even where that takes longer. pause: before it.
        """
        time.sleep(PAUSE_S if pause else 0)
        message = self._task.draw_message(count, self.image)
        answer = self._process.ask("draw", DRAW_S, **message, by_step=by_step)
        at, seconds = _part(answer, "at"), _number(answer.get("seconds"))
        if not seconds:
            raise BenchError(f"{self.name} answered 'draw' without its seconds")
        self.seconds = seconds
        stages = {name: value for name, value in _part(answer, "stages").items() if value is not None}
        try:
            turn = Turn(seconds, read(Stages, stages))
        except FieldError as error:
            raise BenchError(f"{self.name} answered 'draw' with stages that cannot be: {error}") from None
        calls = answer.get("calls")
        end = _number(at.get("end")) or time.time()
        return Drawn(turn, _number(at.get("first_step")), end, calls if isinstance(calls, list) else [])

    def picture(self, count: int) -> Array:
        """The pictures drawn last, uint8 (count, H, W, 3). Raises `BenchError` when they are not what was asked for."""
        wanted = self._task.settings
        shape = count, wanted.height, wanted.width, 3
        try:
            images: Array = np.load(self.image, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BenchError(f"{self.name}: its picture cannot be read ({error})") from None
        if images.dtype != np.uint8 or images.shape != shape:
            raise BenchError(f"{self.name}: its picture is {images.dtype} {images.shape}, not uint8 {shape}")
        return images

    def cold(self, drawn: Drawn) -> Cold:
        """The start of this process, of which `drawn` is the first picture."""
        started = self._process.started
        return Cold(
            import_s=self._process.ready_s,
            load_s=max(self.loaded - started, 0.0),
            first_step_s=None if drawn.first_step is None else max(drawn.first_step - started, 0.0),
            first_image_s=max(drawn.end - started, 0.0),
        )

    @property
    def versions(self) -> dict[str, str]:
        """Of what the system runs with."""
        return self._process.versions

    def end(self) -> dict[str, Any]:
        """End the process. Returns `peak_rss` and `peak_gpu`, bytes or None."""
        return self._process.end()


@contextmanager
def session(name: str, task: Task, precision: str, engine: str | None = None) -> Iterator[Session]:
    """A system that has loaded, in a new process, which is ended with the block. Raises `BenchError`."""
    with running(name) as process:
        yield Session(process, task, precision, engine)


def _part(answer: dict[str, Any], key: str) -> dict[str, Any]:
    value = answer.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """`value` as a finite number of 0 or more, None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    return None
