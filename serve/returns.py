"""Clients that were refused and told when to come again: the room that is kept for them."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

_LATE, _LATE_SHARE = 2.0, 0.1
"""Seconds by which one may come late, as waits are told in whole seconds, and the part of the wait that is added."""
_WEIGHT = 0.02
"""Of the newest value in an average."""
_MORE = 1.25
"""Room is kept for so many times those that came of late: as many as expected come too many half of the time."""
_MOST = 10_000


@dataclass(slots=True)
class _Told:
    """Who was told: at what time to come, how long that holds, and the work and the pictures that come then.

    of_many: whether it is of a client that had most of what was there, or of what was promised. came: whether it came
    when it was told, and was told once more.
    """

    at: float
    until: float
    work: float
    pictures: int
    of_many: bool
    came: bool


class Expected(NamedTuple):
    """Seconds of work and pictures that come before a time, and the work of all."""

    work: float
    pictures: float
    every: float


class Returns:
    """Those who were told to come again, by client and what it asks for.

    Not all of them do. The room that is kept is for the share of them that did of late.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[str, Hashable], _Told] = {}
        self._next = math.inf
        self.share = 1.0

    def __len__(self) -> int:
        return len(self._told)

    def tell(
        self,
        who: tuple[str, Hashable],
        now: float,
        wait: float,
        work: float,
        pictures: int,
        *,
        of_many: bool,
        came: bool,
    ) -> None:
        """Somebody is told to come again in `wait` seconds. work: seconds that the pictures take among others."""
        self._forget(now)
        if len(self._told) < _MOST:
            until = now + wait + _LATE + _LATE_SHARE * wait
            self._told[who] = _Told(now + wait, until, work, pictures, of_many, came)
            self._next = min(self._next, until)

    def left(self, who: tuple[str, Hashable], now: float) -> float | None:
        """Seconds until the time that somebody was told; None for those who were told none."""
        self._forget(now)
        told = self._told.get(who)
        return None if told is None else told.at - now

    def come(self, who: tuple[str, Hashable]) -> None:
        """Somebody has come again, and needs no room from now on."""
        if self._told.pop(who, None) is not None:
            self.share += _WEIGHT * (1 - self.share)

    def has_most(self, client: str, pictures: int, rows: int) -> bool:
        """Whether more than half of the pictures told would be of one client, if these were too; not up to `rows`."""
        own = pictures + sum(told.pictures for (theirs, _), told in self._told.items() if theirs == client)
        return own > rows and 2 * own > pictures + sum(told.pictures for told in self._told.values())

    def expected(self, now: float, before: float = math.inf, *, client: str, of_many: bool) -> Expected:
        """What is expected to come again: before a time, and in all.

        client: who wants to know. of_many: with those of other clients that have most, for whom it keeps no room where
        it has little itself.
        """
        self._forget(now)
        share = min(1.0, _MORE * self.share)
        work = pictures = every = 0.0
        for (theirs, _), told in self._told.items():
            if of_many or not told.of_many or theirs == client:
                part = 1.0 if told.came else share
                every += part * told.work
                if told.at < before:
                    work += part * told.work
                    pictures += part * told.pictures
        return Expected(work, pictures, every)

    def again(self) -> float:
        """The work of those that came when they were told, and were told once more."""
        return sum(told.work for told in self._told.values() if told.came)

    def _forget(self, now: float) -> None:
        if now <= self._next:
            return
        for who in [who for who, told in self._told.items() if told.until < now]:
            del self._told[who]
            self.share -= _WEIGHT * self.share
        self._next = min((told.until for told in self._told.values()), default=math.inf)
