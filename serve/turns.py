"""Whose turn it is: which pictures are stepped in the next round, and how long the others wait."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

OLDEST = 4
"""In every so many rounds the picture that came first goes first, however long it takes: none waits for ever."""
_STAY = 4
"""Steps by which a waiting picture must be nearer to its end than a moving one to take its place."""


@dataclass(slots=True, eq=False, kw_only=True)
class Turn:
    """A picture on its way, as far as the choice needs it.

    client: whose it is. remaining: its steps. arrived: a number that grows with every picture. moving: whether it was
    stepped in the last round. group: pictures that one call of the denoiser can step together; most: how many it takes.
    """

    client: str
    remaining: int
    arrived: int
    priority: int = 0
    moving: bool = False
    group: Hashable = None
    most: int = 1 << 30

    @property
    def claim(self) -> int:
        """The smallest is next: the steps that are left. One that moves stays ahead of those with about as many."""
        return self.remaining - (_STAY if self.moving else 0)


T = TypeVar("T", bound=Turn)


def in_order(turns: Iterable[T]) -> list[T]:
    """Pictures in the order in which they are to move.

    First by priority; then the first one of each client before the second one of any; then by their claims.
    """
    by_claim = sorted(turns, key=lambda turn: (-turn.priority, turn.claim, turn.arrived))
    seen: Counter[str] = Counter()
    places: list[tuple[tuple[int, int, int, int], T]] = []
    for turn in by_claim:
        places.append(((-turn.priority, seen[turn.client], turn.claim, turn.arrived), turn))
        seen[turn.client] += 1
    return [turn for _, turn in sorted(places, key=lambda place: place[0])]


def choose(turns: Iterable[T], most: int, *, oldest: bool = False) -> list[T]:
    """The pictures of the next round, which are one call: the first in order, and those that can go along with it.

    oldest: let the first be the one that came first, of the highest priority; see `OLDEST`.
    """
    order = in_order(turns)
    first = min(order, key=lambda turn: (-turn.priority, turn.arrived)) if oldest else order[0]
    along = [first, *(turn for turn in order if turn.group == first.group and turn is not first)]
    return along[: min(most, first.most)]


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds until a picture begins to move, and until it is there."""

    begins: float
    ends: float


def waits(turns: Sequence[T], most: int, step: float, decode: float) -> list[Wait]:
    """How long each picture takes, if no other came and `most` moved at a time in the order given.

    step: seconds that a step of one picture takes beside others. decode: seconds for a picture's decoder.
    """
    free = [0] * most
    rounds: list[tuple[int, int]] = []
    for turn in turns:
        begins = heapq.heappop(free)
        rounds.append((begins, begins + turn.remaining))
        heapq.heappush(free, begins + turn.remaining)
    round_seconds = step * min(most, len(turns))
    ended = sorted(end for _, end in rounds)

    def seconds(at: int, pictures: int) -> float:
        return at * round_seconds + pictures * decode

    places = {end: place for place, end in enumerate(ended, 1)}
    return [Wait(seconds(begins, places.get(begins, 0)), seconds(end, places[end])) for begins, end in rounds]


def until_room(waits: Sequence[Wait], wanted: int, capacity: int) -> float:
    """Seconds until `wanted` more pictures fit beside these, of which `capacity` are the most."""
    leaving = len(waits) + wanted - capacity
    return sorted(wait.ends for wait in waits)[min(leaving, len(waits)) - 1] if leaving > 0 and waits else 0.0
