"""`Drawer`: one device of several. It draws one image an order, and tells of it as it comes."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from PIL import Image

from ..common.errors import DiffoundryError, LoraError, RequestError
from ..runtime.request import Request
from .queue import Pace
from .server import Options, make
from .service import Events
from .tickets import BrokenError, Drawn, OverdueError, Partial, Step, Ticket

_TOLD_S = 0.05
"""Steps are told of once in so many seconds."""
_QUEUE = 1_000_000
"""Images that may wait: a drawer refuses none, whoever sends them counts them."""
_MOST_WARM = 64
"""Models and sizes that it says it has warm."""
_ERRORS = (OverdueError, LoraError, RequestError, BrokenError, DiffoundryError)
"""What an error is called on its way to another process, the first that fits."""


@dataclass(frozen=True, slots=True)
class Order:
    """An image to draw: its seed is in `request`, so that any `Drawer` makes the same of it.

    model: its name. client, priority, patience: as those of a `Ticket`. partial_images: previews. seconds: until it is
    too late, None for never.
    """

    model: str
    request: Request
    client: str = ""
    priority: int = 0
    partial_images: int = 0
    seconds: float | None = None
    patience: float = 1.0


@dataclass(frozen=True, slots=True)
class Moved:
    """`step` steps were made. drawer: by which one. pace: how fast it is, None where it is not known yet."""

    step: int
    drawer: str
    pace: Pace | None


@dataclass(frozen=True, slots=True)
class Shown:
    """How the image looks on its way; number: from 0."""

    number: int
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Finished:
    """The image. tokens, truncated: as those of a `Ticket`."""

    image: Image.Image
    tokens: int
    truncated: dict[str, str]
    pace: Pace | None


@dataclass(frozen=True, slots=True)
class Failed:
    """It cannot be drawn, here or elsewhere. kind: the name of the error."""

    kind: str
    message: str

    @property
    def error(self) -> DiffoundryError:
        """The error, in the process that is told of it."""
        return next(each for each in _ERRORS if each.__name__ == self.kind)(self.message)


News = Moved | Shown | Finished | Failed


class Drawer:
    """A scheduler of its own, for one device."""

    def __init__(self, options: Options, name: str, say: Callable[[str], None]) -> None:
        """name: which one it is. Raises as `server.make` does."""
        self._name = name
        self._service = make(replace(options, queue=_QUEUE, patience=math.inf), say)
        self._drawn: dict[tuple[str, tuple[int, int]], None] = {}
        if options.warm:
            for model in self._service.models:
                manifest = model.pipeline.bundle.manifest
                self._drawn[model.name, (manifest.default_width, manifest.default_height)] = None
        self._service.scheduler.start()

    async def draw(self, order: Order) -> AsyncGenerator[News, None]:
        """What becomes of an order; the last news are `Finished` or `Failed`. Leaving it early frees the row."""
        scheduler = self._service.scheduler
        try:
            model = self._service.models.named(order.model)
            ticket = Ticket(
                model,
                model.pipeline.job(order.request),
                client=order.client,
                priority=order.priority,
                patience=order.patience,
                partial_images=order.partial_images,
                deadline=None if order.seconds is None else time.monotonic() + order.seconds,
            )
            events = Events(ticket)
            scheduler.submit(ticket)
        except DiffoundryError as error:
            yield _failed(error)
            return
        try:
            async for news in self._news(ticket, events):
                yield news
        finally:
            scheduler.cancel(ticket)  # which does nothing to one that is over

    async def _news(self, ticket: Ticket, events: Events) -> AsyncGenerator[News, None]:
        told = 0.0
        async for event in events:
            if isinstance(event, Step) and time.monotonic() - told >= _TOLD_S:
                told = time.monotonic()
                yield Moved(event.step, self._name, self._service.scheduler.pace(ticket))
            elif isinstance(event, Partial):
                yield Shown(event.number, event.image)
            elif isinstance(event, Drawn):
                self._note(ticket.model.name, ticket.job.size)
                pace = self._service.scheduler.pace(ticket)
                yield Finished(event.image, ticket.tokens, dict(ticket.truncated), pace)
        if ticket.state != "succeeded":
            yield _failed(ticket.error or BrokenError("the server ended before this was drawn"))

    def _note(self, model: str, size: tuple[int, int]) -> None:
        """Something was drawn; what was drawn longest ago is forgotten where it is much."""
        self._drawn.pop((model, size), None)
        self._drawn[model, size] = None
        if len(self._drawn) > _MOST_WARM:
            del self._drawn[next(iter(self._drawn))]

    @property
    def warm(self) -> list[str]:
        """What was drawn here by models that are still in memory, as `kind_of` calls it."""
        held = {model.name for model in self._service.models if model.held}
        return [kind_of(*kind) for kind in tuple(self._drawn) if kind[0] in held]

    @property
    def is_ready(self) -> bool:
        """Whether it draws what it is given."""
        return self._service.scheduler.is_ready


def kind_of(model: str, size: tuple[int, int]) -> str:
    """A model and a size in one text: what a drawer that has it warm draws without delay."""
    return f"{model} {size[0]}x{size[1]}"


def _failed(error: DiffoundryError) -> Failed:
    return Failed(next(each for each in _ERRORS if isinstance(error, each)).__name__, str(error))
