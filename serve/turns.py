"""Whose turn it is: which pictures are stepped in the next round, and how long each takes."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(slots=True, eq=False, kw_only=True)
class Turn:
    """A picture on its way, as far as the choice needs it.

    client: whose it is. remaining: its steps. arrived: a number that grows with every picture. due: when it is to be
    done, seconds by some clock; those of short ones are soon after they came. yields: until then it goes behind the
    pictures of clients that have fewer. group: pictures that one call of the denoiser can step together; most: how
    many it takes.
    """

    client: str
    remaining: int
    arrived: int
    due: float = 0.0
    yields: float = float("inf")
    priority: int = 0
    group: Hashable = None
    most: int = 1 << 30


T = TypeVar("T", bound=Turn)


def in_order(turns: Iterable[T], now: float = 0.0) -> list[T]:
    """Pictures in the order in which they are to move.

    First by priority; then the first one of each client before the second one of any, as long as these yield; then by
    when they are due. Nothing that comes later is due before all that is there, so that none waits for ever.
    """
    by_due = sorted(turns, key=lambda turn: (-turn.priority, turn.due, turn.arrived))
    if len({turn.client for turn in by_due}) in (1, len(by_due)):
        return by_due
    seen: Counter[str] = Counter()
    places: list[tuple[tuple[int, int, float, int], T]] = []
    for turn in by_due:
        place = seen[turn.client] if now < turn.yields else 0
        places.append(((-turn.priority, place, turn.due, turn.arrived), turn))
        seen[turn.client] += 1
    return [turn for _, turn in sorted(places, key=lambda place: place[0])]


def choose(order: Sequence[T], most: int) -> list[T]:
    """The pictures of the next round, which are one call: the first in order, and those that can go along with it."""
    first = order[0]
    return [turn for turn in order if turn.group == first.group][: min(most, first.most)]


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds until a picture begins to move, and until it is there."""

    begins: float
    ends: float


def waits(
    order: Sequence[T],
    most: int,
    step: Callable[[T, int], float],
    decode: Callable[[T], float],
    prepare: Callable[[T], float] = lambda turn: 0.0,
    *,
    ahead: float = 0.0,
) -> list[Wait]:
    """How long each picture takes, if no other came: the rounds of `choose`, in the order given.

    step: seconds of a round, by its first picture and how many move. decode: of a picture's decoder. prepare: before it
    can move. ahead: seconds of other work, which comes first.
    """
    waiting: defaultdict[Hashable, deque[int]] = defaultdict(deque)
    for i, turn in enumerate(order):
        waiting[turn.group].append(i)
    moving: dict[Hashable, list[int]] = {group: [] for group in waiting}
    left, begins, ends = [turn.remaining for turn in order], [0.0] * len(order), [0.0] * len(order)
    now = ahead
    while waiting:
        for group, rows in moving.items():
            room = min(most, order[(rows or waiting[group])[0]].most)
            while len(rows) < room and waiting[group]:
                rows.append(waiting[group].popleft())
        group = min(moving, key=lambda each: moving[each][0])
        rows = moving[group]
        for i in rows:
            if left[i] == order[i].remaining and not begins[i]:
                begins[i] = now
                now += prepare(order[i])
        rounds, seconds = max(1, min(left[i] for i in rows)), step(order[rows[0]], len(rows))
        now += rounds * seconds
        begin = now
        for i in rows:
            left[i] -= rounds
            if left[i] <= 0:
                now += decode(order[i])
                ends[i] = now + max(0.0, now - begin - seconds)  # steps come between many decoders
        moving[group] = [i for i in rows if left[i] > 0]
        if not moving[group] and not waiting[group]:
            del moving[group], waiting[group]
    return [Wait(begin, end) for begin, end in zip(begins, ends, strict=True)]


def until_room(waits: Sequence[Wait], wanted: int, capacity: int) -> float:
    """Seconds until `wanted` more pictures fit beside these, of which `capacity` are the most."""
    leaving = len(waits) + wanted - capacity
    return sorted(wait.ends for wait in waits)[min(leaving, len(waits)) - 1] if leaving > 0 and waits else 0.0
