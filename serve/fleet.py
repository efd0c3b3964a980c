"""`Fleet`: tickets here, their images drawn by `Drawer`s elsewhere. Nothing here knows how these are reached."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from ..common.errors import DiffoundryError
from .drawer import Failed, Finished, Moved, News, Order, Shown, kind_of
from .metrics import Metrics
from .models import Models
from .pending import Pending
from .queue import Queue
from .tickets import BrokenError, Drawn, OverdueError, Partial, State, Step, Ticket

_MOST_LOST = 4
"""Drawers that may be lost with an image: one that ends whatever draws it must not end all of them."""
_log = logging.getLogger("diffoundry.serve")

Send = Callable[[Order, str], AsyncGenerator[News, None]]
"""Has a drawer draw an order, one that has its kind (see `kind_of`) warm if it can be. Raises `LostError`."""


class LostError(Exception):
    """The drawer was lost before its image was there."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Sent(Pending):
    """An image of a ticket. told: the most steps that its ticket heard of; shown: the previews that it did.

    drawer: the name of the one that draws it, "" while it waits.
    """

    told: int = 0
    shown: int = 0
    drawer: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def has_begun(self) -> bool:
        return bool(self.drawer)


class Fleet(Queue[_Sent]):
    """Sends each image of a ticket on its own; one whose drawer is lost is drawn anew by another, from its seed.

    A ticket hears no step and no preview twice. All but `drain` is for the thread of the event loop.
    """

    def __init__(
        self,
        models: Models,
        send: Send,
        *,
        most_rows: int,
        drawers: int,
        queue: int,
        patience: float = math.inf,
        metrics: Metrics | None = None,
    ) -> None:
        """most_rows: images that a drawer steps together. drawers: the most there will be. queue: images that may wait
        beside them. patience: see `Admission`."""
        super().__init__(most_rows, most_rows * (drawers - 1) + queue, patience, time.monotonic, metrics)
        self._models, self._send = models, send
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timers: dict[Ticket, asyncio.TimerHandle] = {}
        self._started = False

    def start(self) -> None:
        self._started = True

    @property
    def is_ready(self) -> bool:
        return self._started and not self._draining

    def drain(self, seconds: float) -> bool:
        """See `Queue`. Not to be called by the event loop."""
        with self._lock:
            self._draining = True
            done = self._lock.wait_for(lambda: not self._images, seconds)
            left = {image.ticket for image in self._images}
        for ticket in left:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.cancel, ticket)
        return done

    def submit(self, ticket: Ticket) -> None:
        self._admission.devices = len({image.drawer for image in self._images if image.drawer}) or 1
        super().submit(ticket)
        self._loop = asyncio.get_running_loop()
        if ticket.deadline is not None:
            self._timers[ticket] = self._loop.call_later(ticket.deadline - self._clock(), self._overdue, ticket)
        for image in [image for image in self._images if image.ticket is ticket]:
            # Not a part of the request that asks for it: a job goes on when its request was answered.
            image.task = contextvars.Context().run(self._loop.create_task, self._draw(image))

    def cancel(self, ticket: Ticket) -> None:
        super().cancel(ticket)
        self._end(ticket, "cancelled")

    def _of(self, ticket: Ticket) -> list[_Sent]:
        now = self._clock()
        return [
            _Sent(
                client=ticket.client,
                remaining=ticket.job.table.steps,
                arrived=self._arrived + index,
                priority=ticket.priority,
                group=ticket.kind,
                ticket=ticket,
                index=index,
                came=now,
            )
            for index in range(ticket.count)
        ]

    async def _draw(self, image: _Sent) -> None:
        """Have an image drawn, however many drawers are lost meanwhile, up to some."""
        ticket = image.ticket
        try:
            for _ in range(_MOST_LOST):
                try:
                    async with aclosing(
                        self._send(self._order(image), kind_of(ticket.model.name, ticket.job.size))
                    ) as stream:
                        async for news in stream:
                            self._hear(image, news)
                    if image not in self._images:
                        return
                    why = "it told of no end"
                except LostError as error:
                    why = str(error)
                _log.warning("an image is drawn anew: its replica was lost (%s)", why)
                self.metrics.redrawn.inc()
                image.drawer, image.remaining = "", ticket.job.table.steps
            raise BrokenError(f"{_MOST_LOST} replicas were lost while they drew this: it is not tried again")
        except DiffoundryError as error:
            self._end(ticket, "failed", error)
        except Exception as error:
            _log.error("a request failed by %s: %s", type(error).__name__, error)
            self._end(ticket, "failed", BrokenError("the server failed to draw this; its log says why"))

    def _order(self, image: _Sent) -> Order:
        ticket = image.ticket
        seconds = None if ticket.deadline is None else ticket.deadline - self._clock()
        request = replace(ticket.job.request, seed=ticket.job.seeds[image.index], count=1)
        return Order(
            model=ticket.model.name,
            request=request,
            client=ticket.client,
            priority=ticket.priority,
            partial_images=ticket.partial_images,
            seconds=seconds,
            patience=ticket.patience,
        )

    def _hear(self, image: _Sent, news: News) -> None:
        ticket = image.ticket
        if ticket.is_over:
            return
        if isinstance(news, Failed):
            raise news.error
        if isinstance(news, Shown):
            if news.number == image.shown:
                image.shown += 1
                ticket.tell(Partial(image.index, news.number, news.image))
            return
        if news.pace is not None:
            is_first = not self._meter.has_steps
            self._meter.stepped(ticket.kind, 1, news.pace.step)
            self._meter.took("decode", ticket.kind, news.pace.decode)
            if is_first:
                self._admission.give_time(self._images)
        self._step(image, news.step if isinstance(news, Moved) else ticket.job.table.steps)
        if isinstance(news, Moved):
            image.drawer = news.drawer
        if isinstance(news, Finished):
            ticket.tokens, ticket.truncated = news.tokens, news.truncated
            ticket.images[image.index] = news.image
            self._leave(image)
            self.metrics.images.labels(ticket.model.name).inc()
            ticket.tell(Drawn(image.index, news.image))
            if len(ticket.images) == ticket.count:
                self._end(ticket, "succeeded")

    def _step(self, image: _Sent, step: int) -> None:
        """An image made so many steps; its ticket hears of those that are new to it."""
        ticket = image.ticket
        image.remaining = ticket.job.table.steps - step
        if ticket.state == "queued":
            ticket.state = "running"
            self.metrics.wait.observe(max(0.0, time.time() - ticket.created))
        if step > image.told:
            ticket.step += step - image.told
            image.told = step
            ticket.tell(Step(ticket.step, ticket.steps))

    def _overdue(self, ticket: Ticket) -> None:
        self._end(ticket, "failed", OverdueError("the deadline passed before the pictures were there"))

    def _end(self, ticket: Ticket, state: State, error: DiffoundryError | None = None) -> None:
        """Nothing more becomes of a ticket: its images leave, wherever they are."""
        if ticket in self._timers:
            self._timers.pop(ticket).cancel()
        for image in [image for image in self._images if image.ticket is ticket]:
            self._leave(image)
            if image.task is not None and image.task is not asyncio.current_task():
                image.task.cancel()
        if error is not None and not ticket.is_over:
            self.metrics.errors.labels(type(error).__name__).inc()
        ticket.end(state, error)

    def _leave(self, image: _Sent) -> None:
        with self._lock:
            self._images.remove(image)
            self._lock.notify_all()
