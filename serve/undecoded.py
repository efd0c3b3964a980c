"""Latents that wait for the decoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..common.arrays import Array
from ..runtime.pictures.images import to_image
from .meter import Meter, Part
from .metrics import Metrics
from .rows import Underway
from .tickets import Drawn, Partial, Ticket


@dataclass(frozen=True, slots=True)
class _Latents:
    """number: of a partial image, None for the final one."""

    image: Underway
    latents: Array
    number: int | None = None


class Undecoded:
    """Makes pictures of latents, those first that wait longest."""

    def __init__(
        self,
        meter: Meter,
        metrics: Metrics,
        clock: Callable[[], float],
        fail: Callable[[Ticket, Exception], None],
        drew: Callable[[], None],
    ) -> None:
        """fail: ends a ticket by an error. drew: is called when a picture is there."""
        self._meter, self._metrics, self._clock, self._fail, self._drew = meter, metrics, clock, fail, drew
        self._waiting: deque[_Latents] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def last(self) -> int:
        """The images whose last latents wait: one that is shown on its way has steps left, and counts as moving."""
        return sum(each.number is None for each in tuple(self._waiting))  # another thread may add one

    @property
    def images(self) -> list[Underway]:
        """Whose latents wait, one that is shown on its way as well."""
        return [each.image for each in self._waiting]

    def add(self, image: Underway, latents: Array, number: int | None = None) -> None:
        """Let latents wait. number: of a partial image, None for the final one."""
        self._waiting.append(_Latents(image, latents, number))

    def drop(self, ticket: Ticket) -> None:
        """Forget the latents of a ticket."""
        self._waiting = deque(each for each in self._waiting if each.image.ticket is not ticket)

    def decode(self, seconds: float) -> None:
        """Make one picture, and more where all of them take no longer than so many seconds."""
        begin = self._clock()
        while self._waiting:
            first = self._waiting.popleft()
            part: Part = "decode" if first.number is None else "preview"
            self._decode(first, part)
            spent = self._clock() - begin
            if not spent or spent + self._meter.once(part, first.image.ticket.kind) > seconds:
                return

    def _decode(self, waiting: _Latents, part: Part) -> None:
        image, ticket = waiting.image, waiting.image.ticket
        start = self._clock()
        try:
            if waiting.number is not None:
                decoder = ticket.model.preview_decoder
                pixels = ticket.model.pipeline.decode(np.nan_to_num(waiting.latents)[None], decoder)
                drawn = to_image(pixels[0])
            else:
                drawn = ticket.model.pipeline.picture(ticket.job, waiting.latents)
        except Exception as error:
            self._fail(ticket, error)
            return
        self._meter.took(part, ticket.kind, self._clock() - start)
        if waiting.number is not None:
            ticket.tell(Partial(image.index, waiting.number, drawn))
            return
        self._drew()
        ticket.images[image.index] = drawn
        self._metrics.images.labels(ticket.model.name).inc()
        ticket.tell(Drawn(image.index, drawn))
        if len(ticket.images) == ticket.count:
            ticket.end("succeeded")
