"""Mixed load, stepped and batched by request: the same arrivals, in one process, turn by turn.

python -m diffoundry.bench.serving build/pico.bundle --rows 8 --requests 200 --turns 3

Requests of 4, 20 and 50 steps and of two sizes arrive at random. `stepped` is the scheduler of `diffoundry serve`:
rows come and go between steps. `batched` is what other servers do: the requests of one size that wait are drawn in one
batch, and the next batch begins when it is done. `batched, same steps` takes requests of one number of steps alone, so
that none waits for a longer one beside it.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.pipeline import Pipeline, load
from ..runtime.request import Request
from ..serve.models import Model, Models
from ..serve.scheduler import Scheduler
from ..serve.tickets import Ended, Event, Ticket

_STEPS, _SHARES = (4, 20, 50), (0.6, 0.25, 0.15)
_PROMPTS = ("a large red star at the left", "a small white ring", "a green heart on a navy background")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and the seconds after the begin at which it comes."""

    at: float
    request: Request


def arrivals(count: int, rate: float, seed: int, sizes: Sequence[tuple[int, int]]) -> list[Arrival]:
    """`count` requests, `rate` a second on average (Poisson), all at once where it is 0."""
    rng = np.random.default_rng(seed)
    at, found = 0.0, []
    for i in range(count):
        at += float(rng.exponential(1 / rate)) if rate else 0.0
        steps = int(rng.choice(_STEPS, p=_SHARES))
        width, height = sizes[int(rng.integers(len(sizes)))]
        found.append(Arrival(at, Request(_PROMPTS[i % 3], seed=i, steps=steps, width=width, height=height)))
    return found


def stepped(pipe: Pipeline, coming: Sequence[Arrival], rows: int) -> list[float]:
    """Seconds from the arrival of each to its picture, by the server's scheduler."""
    model = Model("model", pipe)
    scheduler = Scheduler(Models([model]), most_rows=rows, queue=len(coming))
    scheduler.start()
    ended = [0.0] * len(coming)

    def submit(i: int, request: Request) -> None:
        def listen(event: Event) -> None:
            if isinstance(event, Ended):
                ended[i] = time.perf_counter()

        ticket = Ticket(model, pipe.job(request), client=str(i))
        ticket.listeners.append(listen)
        scheduler.submit(ticket)

    begin = _feed(coming, submit)
    scheduler.drain(3600)
    return [end - begin - each.at for end, each in zip(ended, coming, strict=True)]


def batched(pipe: Pipeline, coming: Sequence[Arrival], rows: int, *, same_steps: bool) -> list[float]:
    """The same, by batches that are drawn to their end before the next one begins."""
    inbox: queue.Queue[int | None] = queue.Queue()
    ended = [0.0] * len(coming)

    def alike(request: Request) -> tuple[object, ...]:
        return request.width, request.height, request.steps if same_steps else None

    def work() -> None:
        waiting: list[int] = []
        is_open = True
        while is_open or waiting:
            while is_open and (not waiting or not inbox.empty()):
                came = inbox.get()
                is_open = came is not None
                waiting += [] if came is None else [came]
            if not waiting:
                return
            first = alike(coming[waiting[0]].request)
            batch = [i for i in waiting if alike(coming[i].request) == first][:rows]
            waiting = [i for i in waiting if i not in batch]
            pipe.generate_many([coming[i].request for i in batch])
            now = time.perf_counter()
            for i in batch:
                ended[i] = now

    thread = threading.Thread(target=work)
    thread.start()
    begin = _feed(coming, lambda i, _: inbox.put(i))
    inbox.put(None)
    thread.join()
    return [end - begin - each.at for end, each in zip(ended, coming, strict=True)]


def _feed(coming: Sequence[Arrival], submit: Callable[[int, Request], None]) -> float:
    """Submit each when its time has come. Returns when the first second began."""
    begin = time.perf_counter()
    for i, each in enumerate(coming):
        time.sleep(max(0.0, begin + each.at - time.perf_counter()))
        submit(i, each.request)
    return begin


def measure(pipe: Pipeline, rows: int, count: int, turns: int, sizes: Sequence[tuple[int, int]]) -> list[list[str]]:
    """The rows of the table: for each load and each way its latencies and its throughput."""
    ways: dict[str, Callable[[Sequence[Arrival]], list[float]]] = {
        "stepped": lambda coming: stepped(pipe, coming, rows),
        "batched": lambda coming: batched(pipe, coming, rows, same_steps=False),
        "batched, same steps": lambda coming: batched(pipe, coming, rows, same_steps=True),
    }
    for way in ways.values():  # engines are loaded, and caches warm
        way(arrivals(2 * rows, 0.0, 0, sizes))
    together: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        coming = arrivals(count, 0.0, turn, sizes)
        for name, way in ways.items():
            together[name].append(count / max(way(coming)))
    best = float(np.median(together["batched"]))
    table = [["all at once", name, *[""] * 5, f"{np.median(each):.1f}"] for name, each in together.items()]
    for share in (0.5, 0.7, 0.9):
        found: dict[str, list[tuple[int, float]]] = {name: [] for name in ways}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns):
            coming = arrivals(count, share * best, turn, sizes)
            for name, way in ways.items():
                seconds = way(coming)
                found[name] += zip([each.request.steps or 0 for each in coming], seconds, strict=True)
                rates[name].append(count / max(each.at + own for each, own in zip(coming, seconds, strict=True)))
        for name, pairs in found.items():
            figures = [_quantiles([own for steps, own in pairs if steps == each]) for each in _STEPS]
            short, middle, long = figures
            shown = [*(f"{1000 * each:.0f}" for each in (*short, middle[1], *long)), f"{np.median(rates[name]):.1f}"]
            table.append([f"{share:.0%} of {best:.1f}/s", name, *shown])
    return table


def _quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    return float(np.percentile(seconds, 50)), float(np.percentile(seconds, 99))


HEAD = ("load", "way", "4 steps p50", "p99", "20 steps p99", "50 steps p50", "p99", "pictures/s")


def main() -> None:
    """Print the table, in milliseconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sizes", default="64x64,96x64")
    asked = parser.parse_args()
    sizes = [(int(width), int(height)) for width, height in (each.split("x") for each in asked.sizes.split(","))]
    rows = measure(load(asked.bundle), asked.rows, asked.requests, asked.turns, sizes)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
