"""The thread that draws: rows of all requests come and go between steps. Nothing here knows of HTTP."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

from ..common.errors import BundleError, DiffoundryError, EngineError, OverflowedError
from ..runtime.loop.batch import Batch
from .memory import trim
from .metrics import Metrics
from .models import Model, Models
from .queue import Queue
from .rows import Rows, Underway, underway
from .tickets import BrokenError, OverdueError, Step, Ticket
from .turns import choose, in_order
from .undecoded import Undecoded

_MOST_FAILURES = 3
"""So many failures in a row, of engines or of a bundle's files, make a server that is not ready."""
_TRIM_SECONDS = 10.0
"""After so long what was freed is given back to the system, when nothing is left to do."""
_log = logging.getLogger("diffoundry.serve")


class Scheduler(Queue[Underway]):
    """Draws tickets, all on one thread: in each round one step of the images whose turn it is, then as much decoding.

        scheduler.start()
        scheduler.submit(ticket)
        ticket.ended.wait()

    Without `start` the rounds are made by whoever calls `round`.
    """

    def __init__(
        self,
        models: Models,
        *,
        most_rows: int = 8,
        queue: int = 64,
        patience: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        """most_rows: images of one step. queue, patience: see `Admission`."""
        super().__init__(most_rows, queue, patience, clock, metrics)
        self._models = models
        self._undecoded = Undecoded(
            self._meter, self.metrics, clock, lambda ticket, error: self._fail([ticket], error), self._drew
        )
        self._rows = Rows()
        self._round_seconds = 0.0
        self._last_end: float | None = None
        self._failures = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="diffoundry-serve", daemon=True)

    @property
    def decoding(self) -> int:
        """The images whose last latents wait for the decoder."""
        return self._undecoded.last

    def start(self) -> None:
        """Begin to draw, on a thread of its own."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Take nothing more, draw what is there for so long, and end. Returns whether all of it was drawn."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        with self._lock:
            left = bool(self._images or self._undecoded)
            self._stopping = True
            for image in self._images:
                image.ticket.is_cancelled = True
            self._lock.notify_all()
        return not left

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests and draws them."""
        return self._thread.is_alive() and not self._draining and self._failures < _MOST_FAILURES

    def warm(self, model: Model, first: Ticket | None = None, many: Ticket | None = None) -> None:
        """Load the engines of a model before `start`, so that the first request need not wait.

        first: is drawn. many: a step of its images is made. Times are then known, and so is the memory that is needed.
        """
        self._models.together([model])
        self._models.make_room(model)
        for role in ("text", "denoiser", "decoder"):
            for name in model.pipeline.bundle.manifest.with_role(role):
                model.pipeline.engine(name)
        for ticket in (first, many):
            if ticket is None:
                continue
            self.submit(ticket)
            while self.round():
                if ticket is many:
                    self.cancel(ticket)
            if ticket.error is not None:
                raise ticket.error

    def round(self) -> bool:
        """Step the images whose turn it is, then decode. Returns whether anything was left to do."""
        begin = self._clock() if self._last_end is None else self._last_end  # what comes between rounds takes time too
        with self._lock:
            self._drop_cancelled()
            chosen = self._choose()
        begin += self._place(chosen)
        moving = [image for image in chosen if image.batch is not None and not image.ticket.is_over]
        for key, batch in self._rows.items():
            if images := [image for image in moving if image.batch is batch]:
                begin = self._step(key, batch, images, begin)
        self._undecoded.decode(self._round_seconds)
        is_busy = bool(self._images or self._undecoded)
        if not is_busy:
            self._note_memory()
        self._last_end = self._clock() if is_busy else None
        return is_busy

    def _run(self) -> None:
        trimmed = self._clock()
        while True:
            if not self.present and self._clock() > trimmed + _TRIM_SECONDS:
                trim()
                trimmed = self._clock()
            with self._lock:
                self._lock.wait_for(lambda: self._images or self._undecoded or self._draining)
                if self._stopping or not (self._images or self._undecoded):
                    for image in self._every():
                        image.ticket.end("cancelled")
                    return
            try:
                self.round()
            except Exception as error:  # the thread never ends by one round
                _log.exception("a round failed")
                for image in tuple(self._images):
                    self._fail([image.ticket], error)

    def _of(self, ticket: Ticket) -> list[Underway]:
        return underway(ticket, self._arrived, self._clock())

    def _drop_cancelled(self) -> None:
        now = self._clock()
        for ticket in list(dict.fromkeys(image.ticket for image in self._every())):
            if ticket.is_cancelled:
                self._drop(ticket)
                ticket.end("cancelled")
            elif ticket.deadline is not None and now >= ticket.deadline:
                self._fail([ticket], OverdueError("the deadline passed before the pictures were there"))

    def _every(self) -> Iterable[Underway]:
        return (*self._images, *self._undecoded.images)

    def _drop(self, ticket: Ticket) -> None:
        """Forget the images of a ticket."""
        self._rows.leave(image for image in self._images if image.ticket is ticket)
        with self._lock:
            self._images = [image for image in self._images if image.ticket is not ticket]
            self._undecoded.drop(ticket)

    def _choose(self) -> list[Underway]:
        """The images of this round: none while as many wait for the decoder as may move, or their models for memory."""
        if len(self._undecoded) >= self._most or not self._images:
            return []
        order = in_order(self._in_memory(), self._clock())
        return choose(order, self._most) if order else []

    def _in_memory(self) -> list[Underway]:
        """The images of models that are in memory, or can be, together. Rows of others are taken out."""
        if not self._models.has_bound:
            return self._images
        decoding = [image.ticket.model for image in self._undecoded.images]
        wanted = dict.fromkeys([*(image.ticket.model for image in in_order(self._images, self._clock())), *decoding])
        together = self._models.together(list(wanted), decoding)
        for image in self._images:
            if image.ticket.model not in together:
                image.pause()
        return [image for image in self._images if image.ticket.model in together]

    def _place(self, chosen: Collection[Underway]) -> float:
        """Bring the chosen images into their batches; those that are there and were not chosen give way.

        Returns the seconds that texts and pictures took.
        """
        batches = [image.batch for image in chosen if image.batch is not None]
        for image in self._images:
            if image.batch is not None and image.batch in batches and image not in chosen:
                image.pause()
        self._rows.close_empty()
        for model in dict.fromkeys(image.ticket.model for image in chosen):
            self._models.make_room(model)
        begin = self._clock()
        self._prepare(list(dict.fromkeys(image.ticket for image in chosen if image.ticket.ready is None)))
        seconds = self._clock() - begin
        for image in chosen:
            if image.batch is None and image.ticket.ready is not None:
                self._enter(image, chosen)
        return seconds

    def _prepare(self, tickets: Sequence[Ticket]) -> None:
        """Encode the texts of these together; of those with a picture to encode one in a round."""
        pictured = [ticket for ticket in tickets if ticket.job.picture is not None or ticket.job.image_prompts]
        for model in list(dict.fromkeys(ticket.model for ticket in tickets)):
            own = [ticket for ticket in tickets if ticket.model is model and ticket not in pictured[1:]]
            if not self._made(own) and len(own) > 1:
                for ticket in own:
                    self._made([ticket])

    def _made(self, tickets: Sequence[Ticket]) -> bool:
        """Whether these could be prepared together. One that is alone fails where not."""
        if not tickets:
            return True
        begin = self._clock()
        try:
            ready = tickets[0].model.pipeline.prepare([ticket.job for ticket in tickets])
        except Exception as error:
            if len(tickets) == 1:
                self._fail(tickets, error)
            return False
        for ticket, each in zip(tickets, ready, strict=True):
            ticket.prepared(each)
            self._meter.took("prepare", ticket.kind, (self._clock() - begin) / len(tickets))
        return True

    def _enter(self, image: Underway, chosen: Collection[Underway]) -> None:
        """Bring an image into its batch, where there is a place."""
        ticket = image.ticket
        try:
            is_there = self._rows.enter(image, chosen, self._images)
        except Exception as error:
            self._fail([ticket], error)
            return
        self._note_memory()
        if is_there and ticket.state == "queued":
            ticket.state = "running"
            self.metrics.wait.observe(max(0.0, time.time() - ticket.created))

    def _step(self, key: Hashable, batch: Batch, images: Sequence[Underway], begin: float) -> float:
        """Step the images of a batch that move. begin: of its round. Returns when that was done."""
        try:
            batch.step()
        except Exception as error:
            self._broken(key, batch, images, error)
            return self._clock()
        for image in images:
            image.remaining -= 1
            image.ticket.step += 1
        for image in images:
            if not image.ticket.is_over:
                self._after_step(image, batch)
        for ticket in dict.fromkeys(image.ticket for image in images):
            if not ticket.is_over:
                ticket.tell(Step(ticket.step, ticket.steps))
        self._rows.close_empty()
        end = self._clock()
        self._measured(images, end - begin)
        return end

    def _measured(self, images: Sequence[Underway], seconds: float) -> None:
        """A round of these took so long, without what is done once for a picture."""
        is_first = not self._meter.has_steps
        self._meter.stepped(images[0].ticket.kind, len(images), seconds)
        if is_first:
            self._admission.give_time(self._images)
        self._round_seconds = seconds
        self.metrics.rows.observe(len(images))
        self.metrics.step.observe(seconds)

    def _after_step(self, image: Underway, batch: Batch) -> None:
        """Take the latents of an image that is done, or that is to be shown."""
        if image.handle in batch.done:
            try:
                latents = batch.take(image.handle)
            except DiffoundryError as error:
                self._fail([image.ticket], error)
                return
            image.batch = None
            with self._lock:
                self._images.remove(image)
                self._undecoded.add(image, latents)
        elif image.remaining in image.partials:
            with self._lock:
                self._undecoded.add(image, batch.latents(image.handle), image.shown)
            image.shown += 1

    def _broken(self, key: Hashable, batch: Batch, images: Sequence[Underway], error: Exception) -> None:
        """A step failed. On the host each of its rows is tried alone, so that one does not end the others."""
        if batch.on_host and len(images) > 1:
            self._rows.scatter(images)
            return
        self._fail(list(dict.fromkeys(image.ticket for image in images)), error)
        self._rows.close(key)

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """End tickets by an error. What no request should lead to goes into the log, not to the client."""
        if not isinstance(error, DiffoundryError):
            _log.error("a request failed by %s: %s", type(error).__name__, error)
            error = BrokenError("the server failed to draw this; its log says why")
        if isinstance(error, (BundleError, EngineError, BrokenError)) and not isinstance(error, OverflowedError):
            self._failures += 1  # which numbers of a request alone do not lead to
        for ticket in tickets:
            self._drop(ticket)
            if not ticket.is_over:
                self.metrics.errors.labels(type(error).__name__).inc()
            ticket.end("failed", error)

    def _drew(self) -> None:
        self._failures = 0

    def _note_memory(self) -> None:
        for model in self._models:
            self.metrics.loaded.labels(model.name).set(model.held)
