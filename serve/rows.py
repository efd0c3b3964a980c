"""Images on their way, and the batches in which their rows are stepped."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from ..common.errors import RequestError
from ..runtime.loop.batch import Batch
from ..runtime.loop.sample import Row
from .pending import Pending
from .tickets import Ticket


@dataclass(slots=True, eq=False, kw_only=True)
class Underway(Pending):
    """An image of a scheduler. batch, handle: where its row is. held: its row, where it had to give way.

    alone: whether a step beside others failed. key: of its batch.
    """

    batch: Batch | None = None
    handle: int = -1
    held: Row | None = None
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
            self.held, self.batch = self.batch.pause(self.handle), None


def underway(ticket: Ticket, arrived: int, came: float) -> list[Underway]:
    """The images of a ticket that comes. arrived: the number of the first."""
    steps, parts = ticket.job.table.steps, ticket.partial_images + 1
    return [
        Underway(
            client=ticket.client,
            remaining=steps,
            arrived=arrived + index,
            priority=ticket.priority,
            group=ticket.kind,
            ticket=ticket,
            index=index,
            came=came,
            partials=[steps - max(1, steps * (part + 1) // parts) for part in range(parts - 1)],
        )
        for index in range(ticket.count)
    ]


class Rows:
    """The batches of a scheduler, by what their rows have in common."""

    def __init__(self) -> None:
        self._batches: dict[Hashable, Batch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def items(self) -> list[tuple[Hashable, Batch]]:
        """Batches with their keys, as they are now."""
        return list(self._batches.items())

    def enter(self, image: Underway, chosen: Collection[Underway], every: Iterable[Underway]) -> bool:
        """Bring an image that is ready into its batch; those in there that were not chosen give way.

        Returns whether there was a place. Raises `DiffoundryError` where it cannot be drawn.
        """
        ticket, pipeline, ready = image.ticket, image.ticket.model.pipeline, image.ticket.ready
        if ready is None:
            return False
        if image.key is None:
            image.key = ticket.model.name, pipeline.group(ready, image.index), id(image) if image.alone else None
            image.most = pipeline.most_rows(ticket.job)
        batch = self._batches.get(image.key)
        if batch is None:
            batch = self._batches[image.key] = pipeline.batch(ready)
        for other in every:
            if other.batch is batch and other not in chosen:
                other.pause()
        if len(batch) >= image.most:
            return False
        if image.held is not None:
            image.handle = batch.resume(image.held)
        else:
            image.handle = batch.add(ready.samples[image.index])
        image.batch, image.held = batch, None
        return True

    def leave(self, images: Iterable[Underway]) -> None:
        """Take these images out for good."""
        for image in images:
            if image.batch is not None:
                with contextlib.suppress(RequestError):  # where the batch was closed
                    image.batch.drop(image.handle)
        self.close_empty()

    def scatter(self, images: Sequence[Underway]) -> None:
        """Let each of these images have a batch of its own from now on."""
        for image in images:
            image.pause()
            image.alone, image.key, image.group = True, None, id(image)
        self.close_empty()

    def close(self, key: Hashable) -> None:
        """Give up a batch whose engine failed."""
        if (batch := self._batches.pop(key, None)) is not None:
            with contextlib.suppress(Exception):  # what failed may fail again
                batch.close()

    def close_empty(self) -> None:
        """Give back what batches without rows run in."""
        for key, batch in self.items():
            if not batch and not batch.done:
                self.close(key)
