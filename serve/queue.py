"""`Queue`: the images that were asked for and are not there yet, when each will be, and what is refused."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..common.errors import DiffoundryError
from .admission import Admission, QueueFullError
from .meter import Meter
from .metrics import Metrics
from .pending import Pending
from .tickets import Ticket
from .turns import in_order


class DrainingError(DiffoundryError):
    """The server is about to end."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a ticket stands. place: of its first waiting image, 0 where none waits. seconds: None where not known yet."""

    place: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds for a step of one image beside others, and for its decoder."""

    step: float
    decode: float


T = TypeVar("T", bound=Pending)


class Queue(ABC, Generic[T]):
    """What is common to whatever draws: on a thread here (`Scheduler`), or on other machines (`Fleet`)."""

    def __init__(
        self,
        most_rows: int,
        queue: int,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        """most_rows: images of one step. queue, patience: see `Admission`."""
        self._most, self._clock, self.metrics, self._meter = most_rows, clock, metrics or Metrics(), Meter()
        self._admission = Admission(most_rows, queue, self._meter, clock, patience)
        self._lock = threading.Condition()
        self._images: list[T] = []
        self._arrived = 0
        self._draining = False
        self.metrics.moving.set_function(lambda: sum(image.has_begun for image in tuple(self._images)))
        self.metrics.waiting.set_function(lambda: sum(not image.has_begun for image in tuple(self._images)))
        self.metrics.decoding.set_function(lambda: self.decoding)

    @abstractmethod
    def start(self) -> None:
        """Begin to draw."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it takes requests and draws them."""

    @abstractmethod
    def drain(self, seconds: float) -> bool:
        """Take nothing more, draw what is there for so long, and end. Returns whether all of it was drawn."""

    @abstractmethod
    def _of(self, ticket: Ticket) -> list[T]:
        """The images of a ticket, not begun; `_arrived` is the number of the first."""

    @property
    def decoding(self) -> int:
        """The images whose latents wait for the decoder."""
        return 0

    @property
    def present(self) -> int:
        """The images that are there, begun or not."""
        return len(self._images) + self.decoding

    def submit(self, ticket: Ticket) -> None:
        """Let a ticket be drawn. Raises `DrainingError`, and what `Admission.check` raises."""
        with self._lock:
            if self._draining:
                raise DrainingError("the server is about to end: ask again when another one runs")
            images = self._of(ticket)
            try:
                self._admission.check(self._images, self.decoding, images)
            except QueueFullError:
                self.metrics.refused.inc()
                raise
            self._arrived += len(images)
            self._images += images
            self._lock.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Free the rows of a ticket before the next step."""
        with self._lock:
            ticket.is_cancelled = True
            self._lock.notify_all()

    def outlook(self, ticket: Ticket) -> Outlook:
        """When a ticket comes to its turn, and when it will be done."""
        with self._lock:
            now = self._clock()
            order = in_order(self._images, now)
            waiting = [image for image in order if not image.has_begun]
            behind = [i for i, image in enumerate(waiting, 1) if image.ticket is ticket]
            place = behind[0] if behind and ticket.state == "queued" else 0
            if ticket.is_over or not self._meter.has_steps:
                return Outlook(place, 0.0 if ticket.is_over else None)
            times = self._admission.foresee(order, self.decoding, now)
            decode = self.decoding * self._meter.once("decode", ticket.kind)
        return Outlook(
            place, max((wait.ends for image, wait in times.items() if image.ticket is ticket), default=decode)
        )

    def pace(self, ticket: Ticket) -> Pace | None:
        """How fast images such as those of `ticket` are drawn here; None while nothing was measured."""
        with self._lock:
            if not self._meter.has_steps:
                return None
            return Pace(self._meter.row(ticket.kind), self._meter.once("decode", ticket.kind))
