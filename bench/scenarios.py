"""What a server wants to know: the largest throughput over batches, and the rate of requests that a limit allows."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from .report import BatchTried, Offline, RateTried, Server, Settings, Turn
from .session import Session
from .timing import median, percentile, rows_per_s

_TURNS, _SLOW_S = 3, 20.0
"""Calls of a batch that are counted; one where it takes longer than so many seconds."""
_LEAST_REQUESTS, _MOST_REQUESTS, _SECONDS = 20, 100, 10.0
"""Requests of a rate that is tried: as many as come in so many seconds, within these limits."""
_SEARCHES = 6
_TAIL = 0.01


def offline(session: Session, settings: Settings, tell: Callable[[str], None]) -> Offline:
    """The largest throughput over batches of 1, 2, 4 … and `settings.batch` pictures. Raises `BenchError`.

    tell: is called with what is done next.
    """
    tried: list[BatchTried] = []
    rows = 0.0
    for batch in _batches(settings.batch):
        tell(f"batch {batch}")
        turns = _turns(session, batch)
        seconds = median([turn.seconds for turn in turns])
        tried.append(BatchTried(batch, seconds, batch / seconds))
        if tried[-1].images_per_s == max(each.images_per_s for each in tried):
            in_step = settings.rows // settings.count * batch
            rows = rows_per_s(turns, in_step) or in_step * settings.steps / seconds
    best = max(tried, key=lambda each: each.images_per_s)
    return Offline(session.name, best.images_per_s, rows, best.batch, tuple(tried))


def server(session: Session, settings: Settings, tell: Callable[[str], None]) -> Server:
    """The highest rate of requests whose p99 of latency stays under `settings.p99_s`. Raises `BenchError`.

    Requests come at random (a Poisson process, seeded); those that wait when the system is free go in one batch. No
    rate above the throughput is tried: a queue would grow there, and only the length of the trial would hide it.
    """
    limit = settings.p99_s or 0.0
    tell("batch 1")
    alone = median([turn.seconds for turn in _turns(session, 1)])
    tried: list[RateTried] = []
    best: tuple[float, tuple[float, ...]] = (0.0, ())
    if alone <= limit:
        tell(f"batch {settings.batch}")
        together = median([turn.seconds for turn in _turns(session, settings.batch)])
        low, high = 0.0, max(1 / alone, settings.batch / together)
        for _ in range(_SEARCHES):
            rate = (low + high) / 2
            tell(f"{rate:.3g} requests a second")
            latencies = _latencies(session, settings, rate, limit)
            p99 = percentile(latencies, 99)
            tried.append(RateTried(rate, p99))
            if p99 <= limit:
                low, best = rate, (rate, tuple(latencies))
            else:
                high = rate
    return Server(session.name, limit, best[0], best[1], tuple(tried))


def _batches(most: int) -> list[int]:
    powers = [1]
    while powers[-1] * 2 < most:
        powers.append(powers[-1] * 2)
    return sorted({*powers, most})


def _turns(session: Session, batch: int) -> list[Turn]:
    """Warm turns of a batch; the first call, which is not counted, counts where it takes very long."""
    first = session.draw(batch).turn
    if first.seconds > _SLOW_S:
        return [first]
    return [session.draw(batch).turn for _ in range(_TURNS)]


def _latencies(session: Session, settings: Settings, rate: float, limit: float) -> list[float]:
    """Seconds from arrival to picture of each request. It ends early once too many of them took longer than `limit`."""
    count = min(max(int(rate * _SECONDS), _LEAST_REQUESTS), _MOST_REQUESTS)
    arrivals = np.cumsum(np.random.default_rng(settings.seed & 0xFFFFFFFF).exponential(1 / rate, count)).tolist()
    found: list[float] = []
    start, late = time.perf_counter(), 0
    while len(found) < count and late <= max(1, _TAIL * count):
        waited = arrivals[len(found)] - (time.perf_counter() - start)
        if waited > 0:
            time.sleep(waited)
        now = time.perf_counter() - start
        waiting = [arrival for arrival in arrivals[len(found) : len(found) + settings.batch] if arrival <= now]
        waiting = waiting or arrivals[len(found) : len(found) + 1]
        session.draw(len(waiting), pause=False)
        end = time.perf_counter() - start
        found += [end - arrival for arrival in waiting]
        late = sum(latency > limit for latency in found)
    return found
