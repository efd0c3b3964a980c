"""`Ticket`: what a client asked for, on its way."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..common.errors import DiffoundryError
from ..runtime.conditions.condition import Job
from ..runtime.request import Request
from ..runtime.run import Ready
from ..runtime.schedulers import Table
from .models import Model

_NOTHING = np.empty(0)
_NO_TABLE = Table(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING)
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class OverdueError(DiffoundryError):
    """A request was not done by its deadline."""


class BrokenError(DiffoundryError):
    """Something failed that no request should lead to; the log says what."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step was made: `step` of `steps`, of all its pictures together."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Partial:
    """How image `index` looks on its way; number: from 0, of this image."""

    index: int
    number: int
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Drawn:
    """Image `index` is there."""

    index: int
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing follows: the state of the ticket says how it ended."""


Event = Step | Partial | Drawn | Ended


@dataclass(eq=False, slots=True)
class Ticket:
    """A job of a model, whose it is, and what became of it. The scheduler's thread alone changes it.

    mark: the same for the same request again. patience: how many times as long as others it may take. partial_images:
    previews of each image. deadline: when it is too late, by the scheduler's clock, None for never. step: steps made of
    all its images together; steps: of how many. ready: what its rows start from, once that was made. tokens: that the
    denoiser reads of its prompt. truncated: the parts of its prompts that did not fit. kind: of what one batch steps
    together, and takes as long.
    """

    model: Model
    job: Job
    client: str = ""
    mark: str = ""
    priority: int = 0
    patience: float = 1.0
    partial_images: int = 0
    deadline: float | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    created: float = field(default_factory=time.time)
    state: State = "queued"
    step: int = 0
    images: dict[int, Image.Image] = field(default_factory=dict)
    error: DiffoundryError | None = None
    ready: Ready | None = None
    tokens: int = 0
    truncated: dict[str, str] = field(default_factory=dict)
    is_cancelled: bool = False
    listeners: list[Callable[[Event], Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    steps: int = field(init=False)
    kind: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.steps = self.job.table.steps * self.count
        self.kind = self.model.name, self.model.pipeline.kind(self.job)

    @property
    def count(self) -> int:
        """Its images."""
        return len(self.job.seeds)

    @property
    def is_over(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.state in ("succeeded", "failed", "cancelled")

    def prepared(self, ready: Ready) -> None:
        """Its rows can start."""
        inputs = self.model.pipeline.bundle.manifest.wiring.inputs_from("text.hidden")
        prompt = ready.samples[0].prompt
        self.ready, self.truncated = ready, ready.truncated
        self.tokens = sum(len(prompt[name]) for name in inputs if name in prompt)

    def forget(self) -> None:
        """Give back the memory of what it was drawn from, and of its pictures; what is said of it stays."""
        self.images.clear()
        job = replace(self.job, request=Request(), table=_NO_TABLE, picture=None)
        self.job = replace(job, controls={}, image_prompts={}, regions={}, loras=())

    def tell(self, event: Event) -> None:
        """Let all that listen know."""
        for listener in tuple(self.listeners):
            listener(event)

    def end(self, state: State, error: DiffoundryError | None = None) -> None:
        """Nothing more becomes of it. A ticket ends once."""
        if not self.is_over:
            self.state, self.error, self.ready = state, error, None
            self.tell(Ended())
            self.ended.set()
