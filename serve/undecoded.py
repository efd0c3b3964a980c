"""Latents that wait for the decoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..common.arrays import Array
from ..runtime.pictures.images import to_image
from ..runtime.pictures.tiling import Parts
from .meter import Meter, Part
from .metrics import Metrics
from .rows import Underway
from .tickets import Drawn, Partial, Ticket


@dataclass(slots=True, eq=False)
class _Latents:
    """number: of a partial image, None for the final one. parts: its decoder, begun; seconds: that it took so far."""

    image: Underway
    latents: Array
    number: int | None = None
    parts: Parts[Image.Image] | None = None
    seconds: float = 0.0


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
        """Decode one picture, or a tile of one, and more where all of it takes no longer than so many seconds."""
        begin = self._clock()
        while self._waiting:
            start = self._clock()
            self._advance(self._waiting[0], start)
            end = self._clock()
            if end == begin or end - begin + (end - start) > seconds:
                return

    def _advance(self, waiting: _Latents, start: float) -> None:
        """Decode the next part of this, and tell whose it is when it is a picture."""
        image, ticket = waiting.image, waiting.image.ticket
        try:
            drawn = self._part(waiting)
        except Exception as error:
            self._fail(ticket, error)
            return
        waiting.seconds += self._clock() - start
        if drawn is None:
            return
        self._waiting.remove(waiting)
        part: Part = "decode" if waiting.number is None else "preview"
        self._meter.took(part, ticket.kind, waiting.seconds)
        if waiting.number is not None:
            ticket.tell(Partial(image.index, waiting.number, drawn))
            return
        self._drew()
        ticket.images[image.index] = drawn
        self._metrics.images.labels(ticket.model.name).inc()
        ticket.tell(Drawn(image.index, drawn))
        if len(ticket.images) == ticket.count:
            ticket.end("succeeded")

    def _part(self, waiting: _Latents) -> Image.Image | None:
        """Decode the next part. Returns the picture where it was the last one."""
        ticket = waiting.image.ticket
        pipeline = ticket.model.pipeline
        if waiting.number is not None:
            pixels = pipeline.decode(np.nan_to_num(waiting.latents)[None], ticket.model.preview_decoder)
            return to_image(pixels[0])
        if waiting.parts is None:
            waiting.parts = pipeline.picture_parts(ticket.job, waiting.latents)
        try:
            next(waiting.parts)
        except StopIteration as end:
            drawn: Image.Image = end.value
            return drawn
        return None
