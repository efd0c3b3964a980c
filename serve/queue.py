"""`Queue`: the images that were asked for and are not there yet, when each will be, and what is refused."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..common.errors import DiffoundryError, RequestError
from .meter import Meter
from .metrics import Metrics
from .tickets import OverdueError, Ticket
from .turns import Turn, Wait, in_order, until_room, waits


class QueueFullError(DiffoundryError):
    """There is no place for a request. retry_after: seconds, as measured, until there is one."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


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


@dataclass(slots=True, eq=False, kw_only=True)
class Image(Turn, ABC):
    """An image of a ticket."""

    ticket: Ticket
    index: int

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Whether it waits no more."""


T = TypeVar("T", bound=Image)


class Queue(ABC, Generic[T]):
    """What is common to whatever draws: on a thread here (`Scheduler`), or on other machines (`Fleet`)."""

    def __init__(
        self, capacity: int, most_rows: int, clock: Callable[[], float] = time.monotonic, metrics: Metrics | None = None
    ) -> None:
        """capacity: images that may be there. most_rows: images of one step."""
        self._capacity, self._most = capacity, most_rows
        self._clock, self.metrics, self._meter = clock, metrics or Metrics(), Meter()
        self._lock = threading.Condition()
        self._images: list[T] = []
        self._undecoded: deque[Any] = deque()
        self._arrived = 0
        self._draining = False

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
    def _image(self, ticket: Ticket, index: int) -> T:
        """Image `index` of a ticket, not begun."""

    @property
    def _devices(self) -> int:
        """How many draw at the same time, `most_rows` images each."""
        return 1

    def submit(self, ticket: Ticket) -> None:
        """Let a ticket be drawn. Raises `QueueFullError`, `DrainingError`, `RequestError` for more than is ever taken.

        The last quarter of the places is for clients that have less than half of them.
        """
        with self._lock:
            if self._draining:
                raise DrainingError("the server is about to end: ask again when another one runs")
            if ticket.count > self._capacity:
                raise RequestError(f"{ticket.count} images are more than the queue holds: ask for {self._capacity}")
            own = sum(image.ticket.client == ticket.client for image in self._images) + ticket.count
            capacity = self._capacity
            if own > self._capacity // 2 and own > ticket.count:
                capacity -= self._capacity // 4
            images = [self._image(ticket, index) for index in range(ticket.count)]
            self._check_room(images, max(capacity, ticket.count))
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
            images = in_order(self._images)
            own = [i for i, image in enumerate(images) if image.ticket is ticket]
            waiting = [i for i, image in enumerate(images) if not image.has_begun]
            behind = [i for i in own if not images[i].has_begun]
            place = 1 + waiting.index(behind[0]) if behind and ticket.state == "queued" else 0
            times = self._waits(images, ticket.kind)
            decode = len(self._undecoded) * self._meter.decode(ticket.kind)
        if times is None or ticket.is_over:
            return Outlook(place, 0.0 if ticket.is_over else None)
        return Outlook(place, max((times[i].ends for i in own), default=0.0) + decode)

    def pace(self, ticket: Ticket) -> Pace | None:
        """How fast images such as those of `ticket` are drawn here; None while nothing was measured."""
        with self._lock:
            step = self._meter.step(ticket.kind)
            return None if step is None else Pace(step, self._meter.decode(ticket.kind))

    def _waits(self, images: Sequence[T], kind: Hashable) -> list[Wait] | None:
        """How long each takes, in this order; None while nothing was measured."""
        most, devices = self._most * self._devices, self._devices
        steps = [self._meter.step(image.ticket.kind) for image in images[:most]] or [self._meter.step(kind)]
        known = [step for step in steps if step is not None]
        if not known:
            return None
        return waits(images, most, sum(known) / len(known) / devices, self._meter.decode(kind) / devices)

    def _check_room(self, images: Sequence[T], capacity: int) -> None:
        """Raise `QueueFullError` where the queue does not take these, `OverdueError` where their deadline does not."""
        ticket, now = images[0].ticket, self._clock()
        if len(self._images) + len(self._undecoded) + len(images) > capacity:
            times = self._waits(in_order(self._images), ticket.kind)
            seconds = 1.0 if times is None else until_room(times, len(images), capacity)
            raise QueueFullError(max(1, math.ceil(seconds)))
        if ticket.deadline is not None:
            order = in_order([*self._images, *images])
            times = self._waits(order, ticket.kind) or []
            ends = max((time.ends for image, time in zip(order, times, strict=False) if image in images), default=0.0)
            if now + ends >= ticket.deadline:
                raise OverdueError(f"this would be done in about {ends:.1f} s, after its deadline: give it more time")
