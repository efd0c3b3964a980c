"""Whether a request is taken: only where it, and all that was taken before, will be done in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ..common.errors import DiffoundryError, RequestError
from .demand import Demand
from .meter import Meter
from .pending import Pending
from .returns import Returns
from .tickets import OverdueError, Ticket
from .turns import Wait, in_order, until_room, waits

PATIENCE = 3.0
"""Times what a request takes in a full batch by which it is done, where it is not said."""
_RESERVE, _RESERVE_OF_MANY = 0.15, 0.25
"""Parts of its time that a request leaves free for others; the second one where most images are of its client."""
_RESERVE_UNDER_PRESSURE = 0.75
"""What both grow to with the pressure (see `Demand`): with a patience of 3 that leaves less than a full batch takes."""
_LEAST = 0.05
"""The shortest wait, as a part of the time that a request may take."""
_BOOKED = 0.4
"""The part of the server's time that is promised to those who are told to come again."""
_EARLY = 0.05
"""Seconds by which one may come before the time that it was told."""
_FARTHEST = 60.0
"""Seconds from now for which room is kept; clients of OpenAI wait no longer either."""


class QueueFullError(DiffoundryError):
    """There is no place for a request. seconds: until there is one, None where that is too far away to say."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        when = "later" if seconds is None else f"in {self.retry_after} s"
        super().__init__(f"the queue is full: try again {when}")

    @property
    def retry_after(self) -> int | None:
        """Whole seconds until there is a place."""
        return None if self.seconds is None else max(1, math.ceil(self.seconds))


@dataclass(slots=True)
class Admission:
    """Takes requests or refuses them. It knows when each would be done, by the steps, decoders and texts measured.

    most: images of one step of one device. devices: how many draw at the same time. queue: images that may be there
    beside a step of one. patience: how many times what it takes in a full batch of its kind a request may take;
    math.inf for any.
    """

    most: int
    queue: int
    meter: Meter
    clock: Callable[[], float]
    patience: float = PATIENCE
    returns: Returns = field(default_factory=Returns)
    demand: Demand = field(default_factory=Demand)
    devices: int = 1

    @property
    def capacity(self) -> int:
        """Images that may be there."""
        return self.most + self.queue

    @property
    def rows(self) -> int:
        """Images that move at the same time."""
        return self.most * self.devices

    def give_time(self, images: Sequence[Pending]) -> None:
        """Say when these are due, from when they came."""
        for image in images:
            times = self.patience if math.isfinite(self.patience) else PATIENCE
            allowed = times * image.ticket.patience * self._in_full_batch(image.ticket)
            image.due, image.yields = image.came + allowed, image.came + allowed / 2

    def check(self, here: Sequence[Pending], decoding: int, images: Sequence[Pending]) -> None:
        """Take a request, or raise `QueueFullError`, `OverdueError`, or `RequestError` where it is never taken.

        here: images that have steps left. decoding: how many wait for the decoder. images: those of the request.
        """
        ticket, now = images[0].ticket, self.clock()
        if len(images) > self.capacity:
            raise RequestError(f"{len(images)} images are more than the queue holds: ask for {self.capacity}")
        self.give_time(images)
        if ticket.deadline is not None:
            together = self.foresee([*here, *images], decoding, now)
            ends = max(together[image].ends for image in images)
            if now + ends >= ticket.deadline:
                raise OverdueError(f"this would be done in about {ends:.1f} s, after its deadline: give it more time")
        who = ticket.client, ticket.mark or ticket.id
        left = self.returns.left(who, now)
        is_due = left is not None and left <= _EARLY
        if not is_due:
            self.demand.come(now, self._work(ticket))
        wait = self._wait(here, decoding, images, now, is_due=is_due)
        if wait is None or is_due:
            self.returns.come(who)
        if wait is None:
            return
        if left is not None and not is_due:
            raise QueueFullError(left)  # it came too early; its time stays
        if wait > max(_FARTHEST, images[0].due - now):
            raise QueueFullError(None)
        own = sum(image.ticket.client == ticket.client for image in here)
        of_many = self._has_most(own, len(here) + decoding, len(images))
        of_many = of_many or self.returns.has_most(ticket.client, len(images), self.rows)
        self.returns.tell(who, now, wait, self._work(ticket), len(images), of_many=of_many, came=is_due)
        raise QueueFullError(wait)

    def foresee(self, images: Sequence[Pending], decoding: int, now: float) -> dict[Pending, Wait]:
        """When each of these is done, if no other came."""
        seconds, once = cache(self.meter.round), cache(self.meter.once)

        def step(image: Pending, rows: int) -> float:
            return seconds(image.ticket.kind, math.ceil(rows / self.devices))

        def decode(image: Pending) -> float:
            kind, shown = image.ticket.kind, sum(each < image.remaining for each in image.partials)
            return (once("decode", kind) + (shown and shown * once("preview", kind))) / self.devices

        def prepare(image: Pending) -> float:
            begins = image.ticket.ready is None and image.index == 0
            return once("prepare", image.ticket.kind) if begins else 0.0

        ahead = decoding * once("decode", images[0].ticket.kind) if images else 0.0
        order = in_order(images, now)
        return dict(zip(order, waits(order, self.rows, step, decode, prepare, ahead=ahead), strict=True))

    def _wait(
        self,
        here: Sequence[Pending],
        decoding: int,
        images: Sequence[Pending],
        now: float,
        *,
        is_due: bool,
    ) -> float | None:
        """Seconds until a request can be taken, None where it can be now. is_due: it comes when it was told to.

        Where rows are free it is taken in any case. Others leave room for those who were told to come before it is
        done, and for some who may, the more of it the more is asked for: at last they are taken where rows are free
        alone. The last quarter of the queue is for clients that have less than half of what is there.
        """
        present, count, capacity = len(here) + decoding, len(images), self.capacity
        own = sum(image.ticket.client == images[0].ticket.client for image in here)
        has_most = self._has_most(own, present, count)
        if own and 2 * (own + count) > capacity:
            capacity = max(capacity - capacity // 4, count)
        if present + count <= min(self.rows, capacity):
            return None
        allowed = images[0].due - now
        work, pictures, reserve, before = 0.0, 0.0, 0.0, self.returns.again() / _BOOKED
        if not is_due:
            expected = self.returns.expected(now, now + allowed, client=images[0].ticket.client, of_many=has_most)
            work, pictures, before = expected.work, expected.pictures, expected.every / _BOOKED
            reserve = _RESERVE_OF_MANY if has_most else _RESERVE
            reserve += (_RESERVE_UNDER_PRESSURE - reserve) * self.demand.pressure
        late, short = -math.inf, -math.inf
        if math.isfinite(self.patience):
            alone, together = (self.foresee(each, decoding, now) for each in (here, [*here, *images]))
            foreseen = _Foreseen(alone, together, now)
            late, short = foreseen.late(images), foreseen.late(images, reserve)
        if present + count + min(pictures, self.queue) <= capacity and max(short, late + work) <= 0:
            return None
        if not self.meter.has_steps:
            return 1.0
        room = 0.0
        if present + count > capacity:
            room = until_room([*self.foresee(here, decoding, now).values()], count, capacity)
        return max(_LEAST * allowed, short, late + before, room + before)

    def _has_most(self, own: int, present: int, count: int) -> bool:
        """Whether a client with `own` images that asks for `count` has more than half of what is, or may be, there."""
        return own > 0 and (2 * (own + count) > self.capacity or (own > self.rows and 2 * own > present))

    def _in_full_batch(self, ticket: Ticket) -> float:
        """Seconds that a request takes where every row is one like its own."""
        rounds = ticket.steps // ticket.count * math.ceil(ticket.count / self.rows)
        if not self.meter.has_steps:
            return float(rounds)  # which is as good for the order
        pictures = max(self.most, math.ceil(ticket.count / self.devices))
        return self._and_once(ticket, rounds * self.meter.round(ticket.kind, self.most), pictures)

    def _work(self, ticket: Ticket) -> float:
        """Seconds that a request keeps the server busy, among others."""
        return self._and_once(ticket, ticket.steps * self.meter.row(ticket.kind), ticket.count) / self.devices

    def _and_once(self, ticket: Ticket, steps: float, pictures: int) -> float:
        """Seconds of its steps, and of what is done once: texts, previews, and the decoder of so many pictures."""
        kind, once = ticket.kind, self.meter.once
        shown = ticket.count * ticket.partial_images * once("preview", kind)
        return once("prepare", kind) + steps + shown + pictures * once("decode", kind)


@dataclass(frozen=True, slots=True)
class _Foreseen:
    """When images are done without those of a request, and together with them."""

    alone: Mapping[Pending, Wait]
    together: Mapping[Pending, Wait]
    now: float

    def late(self, images: Sequence[Pending], reserve: float = 0.0) -> float:
        """Seconds by which the latest is too late because of these images, negative where none is.

        reserve: the last part of the time of each that is left free. One that would be late without them as well is not
        held against them.
        """
        return max(
            self.now + wait.ends - image.due + reserve * (image.due - image.came)
            for image, wait in self.together.items()
            if image in images
            or (self.now + self.alone[image].ends <= image.due and wait.ends > self.alone[image].ends)
        )
