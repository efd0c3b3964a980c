"""The thread that draws: rows of all requests come and go between steps. Nothing here knows of HTTP."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..common.arrays import Array
from ..common.errors import DiffoundryError, RequestError
from ..runtime.loop.batch import Batch
from ..runtime.loop.sample import Row
from ..runtime.pictures.images import to_image
from .metrics import Metrics
from .models import Model, Models
from .queue import Image, Queue
from .tickets import BrokenError, Drawn, OverdueError, Partial, Step, Ticket
from .turns import OLDEST, choose, in_order

_MOST_FAILURES = 3
"""Engines that fail as often in a row make a server that is not ready."""
_log = logging.getLogger("diffoundry.serve")


@dataclass(slots=True, eq=False, kw_only=True)
class _Image(Image):
    """An image of a ticket. batch, handle: where its row is. held: its row, where it had to give way.

    partials: the numbers of remaining steps at which it is shown. alone: whether a step beside others failed. key: of
    its batch.
    """

    batch: Batch | None = None
    handle: int = -1
    held: Row | None = None
    partials: list[int] = field(default_factory=list)
    shown: int = 0
    alone: bool = False
    key: Hashable = None

    @property
    def has_begun(self) -> bool:
        """Whether it has a row."""
        return self.batch is not None or self.held is not None

    def pause(self) -> None:
        """Take its row out of its batch."""
        if self.batch is not None:
            self.held, self.batch, self.moving = self.batch.pause(self.handle), None, False


@dataclass(frozen=True, slots=True)
class _Undecoded:
    """Latents that wait for the decoder. number: of a partial image, None for the final one."""

    image: _Image
    latents: Array
    number: int | None = None


class Scheduler(Queue[_Image]):
    """Draws tickets, all on one thread: in each round one step of the images whose turn it is, then one picture.

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
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        """most_rows: images of one step. queue: images that may be there beside as many."""
        super().__init__(most_rows + queue, most_rows, clock, metrics)
        self._models = models
        self._undecoded: deque[_Undecoded] = deque()
        self._batches: dict[Hashable, Batch] = {}
        self._rounds = self._failures = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="diffoundry-serve", daemon=True)

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

    def warm(self, model: Model, ticket: Ticket | None) -> None:
        """Load the engines of a model before `start`, and draw `ticket` with it, so that times are known."""
        self._models.together([model])
        self._models.make_room(model)
        for role in ("text", "denoiser", "decoder"):
            for name in model.pipeline.bundle.manifest.with_role(role):
                model.pipeline.engine(name)
        if ticket is not None:
            self.submit(ticket)
            while self.round():
                pass
            if ticket.error is not None:
                raise ticket.error

    def round(self) -> bool:
        """Step the images whose turn it is, then decode one. Returns whether anything was left to do."""
        with self._lock:
            self._drop_cancelled()
            chosen = self._choose()
        self._place(chosen)
        for image in self._images:
            image.moving = image in chosen and image.batch is not None
        for key, batch in list(self._batches.items()):
            self._step(key, batch)
        self._decode()
        self._count()
        return bool(self._images or self._undecoded)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._images or self._undecoded or self._draining)
                if self._stopping or not (self._images or self._undecoded):
                    for image in self._images:
                        image.ticket.end("cancelled")
                    return
            try:
                self.round()
            except Exception as error:  # the thread never ends by one round
                _log.exception("a round failed")
                for image in tuple(self._images):
                    self._fail([image.ticket], error)

    def _image(self, ticket: Ticket, index: int) -> _Image:
        self._arrived += 1
        steps, parts = ticket.job.table.steps, ticket.partial_images + 1
        shown = [steps - max(1, steps * (part + 1) // parts) for part in range(parts - 1)]
        return _Image(
            client=ticket.client,
            remaining=steps,
            arrived=self._arrived,
            priority=ticket.priority,
            group=(ticket.model.name, ticket.model.pipeline.kind(ticket.job)),
            ticket=ticket,
            index=index,
            partials=shown,
        )

    def _drop_cancelled(self) -> None:
        now = self._clock()
        for ticket in list(dict.fromkeys(image.ticket for image in self._every())):
            if ticket.is_cancelled:
                self._drop(ticket)
                ticket.end("cancelled")
            elif ticket.deadline is not None and now >= ticket.deadline:
                self._fail([ticket], OverdueError("the deadline passed before the pictures were there"))

    def _every(self) -> Iterable[_Image]:
        return (*self._images, *(each.image for each in self._undecoded))

    def _drop(self, ticket: Ticket) -> None:
        """Forget the images of a ticket."""
        for image in self._images:
            if image.ticket is ticket and image.batch is not None:
                with contextlib.suppress(RequestError):  # where the batch was closed
                    image.batch.drop(image.handle)
        with self._lock:
            self._images = [image for image in self._images if image.ticket is not ticket]
            self._undecoded = deque(each for each in self._undecoded if each.image.ticket is not ticket)
        self._close_empty()

    def _choose(self) -> list[_Image]:
        """The images of this round, none while as many wait for the decoder as may move."""
        if len(self._undecoded) >= self._most or not self._images:
            return []
        self._rounds += 1
        return choose(self._in_memory(), self._most, oldest=self._rounds % OLDEST == 0)

    def _in_memory(self) -> list[_Image]:
        """The images of models that are in memory, or can be, together. Rows of others are taken out."""
        decoding = [each.image for each in self._undecoded]
        wanted = dict.fromkeys(image.ticket.model for image in (*in_order(self._images), *decoding))
        together = self._models.together(list(wanted))
        for image in self._images:
            if image.ticket.model not in together:
                image.pause()
        return [image for image in self._images if image.ticket.model in together]

    def _place(self, chosen: Collection[_Image]) -> None:
        """Bring the chosen images into their batches; those that are there and were not chosen give way."""
        batches = [image.batch for image in chosen if image.batch is not None]
        for image in self._images:
            if image.batch in batches and image not in chosen:
                image.pause()
        self._close_empty()
        for model in dict.fromkeys(image.ticket.model for image in chosen):
            self._models.make_room(model)
        self._prepare(list(dict.fromkeys(image.ticket for image in chosen if image.ticket.ready is None)))
        for image in chosen:
            if image.batch is None and image.ticket.ready is not None:
                try:
                    self._enter(image, chosen)
                except Exception as error:
                    self._fail([image.ticket], error)

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
        try:
            ready = tickets[0].model.pipeline.prepare([ticket.job for ticket in tickets])
        except Exception as error:
            if len(tickets) == 1:
                self._fail(tickets, error)
            return False
        for ticket, each in zip(tickets, ready, strict=True):
            ticket.prepared(each)
        return True

    def _enter(self, image: _Image, chosen: Collection[_Image]) -> None:
        """Bring an image into its batch, where there is a place."""
        ticket, pipeline, ready = image.ticket, image.ticket.model.pipeline, image.ticket.ready
        if ready is None:
            return
        if image.key is None:
            image.key = ticket.model.name, pipeline.group(ready, image.index), id(image) if image.alone else None
            image.most = pipeline.most_rows(ticket.job)
        batch = self._batches.get(image.key)
        if batch is None:
            batch = self._batches[image.key] = pipeline.batch(ready)
        for other in self._images:
            if other.batch is batch and other not in chosen:
                other.pause()
        if len(batch) >= image.most:
            return
        if image.held is not None:
            image.handle = batch.resume(image.held)
        else:
            image.handle = batch.add(ready.samples[image.index])
        image.batch, image.held = batch, None
        if ticket.state == "queued":
            ticket.state = "running"
            self.metrics.wait.observe(max(0.0, time.time() - ticket.created))

    def _step(self, key: Hashable, batch: Batch) -> None:
        images = [image for image in self._images if image.batch is batch and image.moving]
        if not images:
            return
        start = self._clock()
        try:
            batch.step()
        except Exception as error:
            self._broken(key, batch, images, error)
            return
        self._failures = 0
        seconds = self._clock() - start
        self._meter.stepped(images[0].ticket.kind, len(images), seconds)
        self.metrics.rows.observe(len(images))
        self.metrics.step.observe(seconds)
        for image in images:
            image.remaining -= 1
            image.ticket.step += 1
        for image in images:
            if not image.ticket.is_over:
                self._after_step(image, batch)
        for ticket in dict.fromkeys(image.ticket for image in images):
            if not ticket.is_over:
                ticket.tell(Step(ticket.step, ticket.steps))
        self._close_empty()

    def _after_step(self, image: _Image, batch: Batch) -> None:
        """Take the latents of an image that is done, or that is to be shown."""
        if image.handle in batch.done:
            try:
                latents = batch.take(image.handle)
            except DiffoundryError as error:
                self._fail([image.ticket], error)
                return
            image.batch, image.moving = None, False
            with self._lock:
                self._images.remove(image)
                self._undecoded.append(_Undecoded(image, latents))
        elif image.remaining in image.partials:
            with self._lock:
                self._undecoded.append(_Undecoded(image, batch.latents(image.handle), image.shown))
            image.shown += 1

    def _broken(self, key: Hashable, batch: Batch, images: Sequence[_Image], error: Exception) -> None:
        """A step failed. On the host each of its rows is tried alone, so that one does not end the others."""
        if batch.on_host and len(images) > 1:
            for image in images:
                image.pause()
                image.alone, image.key, image.group = True, None, id(image)
            self._close_empty()
            return
        self._failures += 1
        self._fail(list(dict.fromkeys(image.ticket for image in images)), error)
        if self._batches.pop(key, None) is not None:
            with contextlib.suppress(Exception):  # what failed may fail again
                batch.close()

    def _close_empty(self) -> None:
        for key, batch in list(self._batches.items()):
            if not batch and not batch.done:
                del self._batches[key]
                with contextlib.suppress(Exception):
                    batch.close()

    def _decode(self) -> None:
        """Make one picture of latents, the ones that wait longest."""
        if not self._undecoded:
            return
        with self._lock:
            waiting = self._undecoded.popleft()
        image, ticket = waiting.image, waiting.image.ticket
        start = self._clock()
        try:
            if waiting.number is not None:
                decoder = ticket.model.preview_decoder
                pixels = ticket.model.pipeline.decode(np.nan_to_num(waiting.latents)[None], decoder)
                ticket.tell(Partial(image.index, waiting.number, to_image(pixels[0])))
                return
            ticket.images[image.index] = drawn = ticket.model.pipeline.picture(ticket.job, waiting.latents)
        except Exception as error:
            self._fail([ticket], error)
            return
        self._meter.decoded(ticket.kind, self._clock() - start)
        self.metrics.images.labels(ticket.model.name).inc()
        ticket.tell(Drawn(image.index, drawn))
        if len(ticket.images) == ticket.count:
            ticket.end("succeeded")

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """End tickets by an error. What no request should lead to goes into the log, not to the client."""
        if not isinstance(error, DiffoundryError):
            _log.error("a request failed by %s: %s", type(error).__name__, error)
            error = BrokenError("the server failed to draw this; its log says why")
        for ticket in tickets:
            self._drop(ticket)
            if not ticket.is_over:
                self.metrics.errors.labels(type(error).__name__).inc()
            ticket.end("failed", error)

    def _count(self) -> None:
        begun = sum(image.has_begun for image in self._images)
        self.metrics.moving.set(begun)
        self.metrics.waiting.set(len(self._images) - begun)
        self.metrics.decoding.set(len(self._undecoded))
        for model in self._models:
            self.metrics.loaded.labels(model.name).set(model.held)
