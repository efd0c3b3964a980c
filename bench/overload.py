"""More requests than can be drawn: what the server refuses, how long those that it takes wait, who comes again.

python -m diffoundry.bench.overload build/pico.bundle

The requests of `bench.serving`, at random, at multiples of what can be drawn, on its clock. Each is taken or refused by
the server's scheduler. Of those that are refused a part, `comes again`, asks again when it was told to, until it is
taken or told to come later than is kept for it.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..common.errors import DiffoundryError
from ..runtime.pipeline import Pipeline, load
from ..serve.admission import PATIENCE, QueueFullError
from ..serve.models import Model, Models
from ..serve.scheduler import Scheduler
from ..serve.tickets import Ended, Event, Ticket
from .serving import Arrival, Clock, Mix
from .serving_figures import STEPS

_LOADS = ((0.5, 0.0), (1.0, 0.0), (5.0, 0.0), (5.0, 1.0))
"""Multiples of what can be drawn, and the part of those refused that comes again."""
HEAD = (
    *("load", "comes again", "4 steps: p50", "p99", "20 steps: p99", "50 steps: p99", "pictures/s"),
    *("refused", "come as told", "of them taken", "waited: p50", "most in the queue"),
)


@dataclass(slots=True)
class Found:
    """What came of the arrivals. seconds: by steps, of those taken, from when they were. drawn: while requests came.

    asked: requests, again or not. came: those that asked again when told; taken: how many of these were then taken.
    waited: what they were told. most: images in the queue.
    """

    seconds: dict[int, list[float]] = field(default_factory=lambda: {steps: [] for steps in STEPS})
    refused: int = 0
    asked: int = 0
    came: int = 0
    taken: int = 0
    waited: list[float] = field(default_factory=list)
    most: int = 0
    until: float = 0.0
    drawn: int = 0

    def add(self, other: Found) -> None:
        """What came of other arrivals as well."""
        for steps, seconds in other.seconds.items():
            self.seconds[steps] += seconds
        self.waited += other.waited
        self.most = max(self.most, other.most)
        for name in ("refused", "asked", "came", "taken", "until", "drawn"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def overload(
    pipe: Pipeline, coming: Sequence[Arrival], rows: int, patience: float, obeys: float, *, queue: int = 64
) -> Found:
    """Let them come. obeys: the part of those refused that comes again when it was told to."""
    model, clock, found = Model("model", pipe), Clock(), Found()
    scheduler = Scheduler(Models([model]), most_rows=rows, queue=queue, patience=patience, clock=clock.now)
    scheduler.warm(model, Ticket(model, pipe.job(coming[0].request)))
    clock.skip_to(0.0)
    begin, rng = clock.now(), np.random.default_rng(0)
    waiting = [(begin + each.at, i, False) for i, each in enumerate(coming)]
    heapq.heapify(waiting)

    def ask(i: int, is_again: bool) -> None:
        request, start = coming[i].request, clock.now()

        def listen(event: Event) -> None:
            if isinstance(event, Ended):
                found.seconds[request.steps or 0].append(clock.now() - start)
                found.drawn += clock.now() - begin <= coming[-1].at

        ticket = Ticket(model, pipe.job(request), client=str(i), mark=str(i))
        ticket.listeners.append(listen)
        found.asked += 1
        found.came += is_again
        try:
            scheduler.submit(ticket)
            found.taken += is_again
        except QueueFullError as full:
            found.refused += 1
            if full.seconds is not None and (is_again or rng.random() < obeys):
                found.waited.append(full.seconds)
                heapq.heappush(waiting, (clock.now() + full.seconds, i, True))

    is_busy = False
    while waiting or is_busy:
        if not is_busy:
            clock.skip_to(waiting[0][0])
        while waiting and waiting[0][0] <= clock.now():
            _, i, is_again = heapq.heappop(waiting)
            ask(i, is_again)
        found.most = max(found.most, scheduler.present)
        is_busy = scheduler.round()
    found.until = clock.now() - begin
    return found


def measure(pipe: Pipeline, mix: Mix, rows: int, seconds: float, patience: float, turns: int) -> Iterator[list[str]]:
    """The rows of the table: seconds are those for which requests come, in each turn.

    In each turn what can be drawn is measured, then each load, so that a machine that is slower for a while is so for
    all of them. Behind each p99 of an overload stands its ratio to that of 100 %.
    """
    start = [Arrival(0.0, each.request) for each in mix.arrivals(12 * rows, 0.0, 0)]

    def capacity() -> float:
        return len(start) / overload(pipe, start, rows, float("inf"), 0.0, queue=len(start)).until

    capacity()  # engines are loaded
    rates, every = [], [Found() for _ in _LOADS]
    for turn in range(turns):
        rates.append(capacity())
        for (load_, obeys), found in zip(_LOADS, every, strict=True):
            rate = load_ * rates[-1]
            coming = mix.arrivals(int(rate * seconds), rate, turn + 1)
            found.add(overload(pipe, coming, rows, patience, obeys))
    full: list[float] = []
    for (load_, obeys), found in zip(_LOADS, every, strict=True):
        own = {steps: 1000 * np.array(found.seconds[steps] or [np.nan]) for steps in STEPS}
        slow = [float(np.percentile(own[steps], 99)) for steps in STEPS]
        full = slow if load_ == 1 else full
        yield [
            f"{load_:.0%} of {np.mean(rates):.1f}/s",
            f"{obeys:.0%}",
            f"{np.median(own[STEPS[0]]):.0f}",
            *(
                f"{each:.0f} ({each / base:.2f})" if load_ > 1 else f"{each:.0f}"
                for each, base in zip(slow, full or slow, strict=True)
            ),
            f"{found.drawn / seconds / turns:.2f}",
            f"{found.refused / found.asked:.0%}",
            *((str(found.came), f"{found.taken / found.came:.0%}") if found.came else ("", "")),
            f"{np.median(found.waited):.1f} s" if found.waited else "",
            str(found.most),
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for which requests come, at each load in each turn"
    )
    parser.add_argument("--turns", type=int, default=2, help="of all loads, one after the other")
    parser.add_argument("--patience", type=float, default=PATIENCE)
    parser.add_argument("--sizes", default="64x64,96x64")
    asked = parser.parse_args()
    sizes = tuple((int(width), int(height)) for width, height in (each.split("x") for each in asked.sizes.split(",")))
    try:
        pipe = load(asked.bundle, threads=1)
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
        for row in measure(pipe, Mix(sizes), asked.rows, asked.seconds, asked.patience, asked.turns):
            print(f"| {' | '.join(row)} |", flush=True)
    except DiffoundryError as error:
        parser.exit(1, f"Error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
