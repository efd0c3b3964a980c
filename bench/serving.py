"""Mixed load, stepped and batched by request: the same arrivals, in one process, turn by turn.

Everything is really drawn, on one thread. The clock is the time that this process has had on a processor, and jumps to
the next arrival where nothing is left to do: what else runs on the machine changes little.

python -m diffoundry.bench.serving build/pico.bundle --rows 8 --requests 200 --turns 3 --json load.json --plot load.png

Requests of 4, 20 and 50 steps and of two sizes arrive at random, with `--control` and `--lora` a third of them steered
and a third with a LoRA. `stepped` is the scheduler of `diffoundry serve`:
rows come and go between steps. `batched` is what other servers do: the requests of one size that wait are drawn in one
batch, and the next batch begins when it is done. `batched, same steps` takes requests of one number of steps alone, so
that none waits for a longer one beside it.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.reader import FieldError, read
from ..common.errors import BenchError, DiffoundryError
from ..common.files import read_json, write_json
from ..common.machine import processor
from ..runtime.control import Control
from ..runtime.lora import Lora
from ..runtime.pipeline import Pipeline, load
from ..runtime.request import Request
from ..serve.models import Model, Models
from ..serve.scheduler import Scheduler
from ..serve.tickets import Ended, Event, Ticket
from . import plot, serving_plot
from .serving_figures import LONG, MIDDLE, SHORT, STEPS, Measured
from .timing import median, percentile

_SHARES = 0.6, 0.25, 0.15
_PERCENTILES = (50, 90, 99)
_PROMPTS = ("a large red star at the left", "a small white ring", "a green heart on a navy background")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and the seconds after the begin at which it comes."""

    at: float
    request: Request


@dataclass(frozen=True, slots=True)
class Mix:
    """What the requests are: their sizes, and the ways in which some differ from the plain ones."""

    sizes: tuple[tuple[int, int], ...]
    kinds: tuple[dict[str, Any], ...] = ({},)

    def arrivals(self, count: int, rate: float, seed: int) -> list[Arrival]:
        """`count` requests, `rate` a second on average (Poisson), all at once where it is 0."""
        rng = np.random.default_rng(seed)
        at, found = 0.0, []
        for i in range(count):
            at += float(rng.exponential(1 / rate)) if rate else 0.0
            steps = int(rng.choice(STEPS, p=_SHARES))
            width, height = self.sizes[int(rng.integers(len(self.sizes)))]
            more = self.kinds[int(rng.integers(len(self.kinds)))]
            own = Request(_PROMPTS[i % 3], seed=i, steps=steps, width=width, height=height, **more)
            found.append(Arrival(at, own))
        return found


class Clock:
    """Seconds on a processor, and those that were skipped because there was nothing to do."""

    def __init__(self) -> None:
        self._begin = time.process_time()

    def now(self) -> float:
        """Seconds since the begin."""
        return time.process_time() - self._begin

    def skip_to(self, at: float) -> None:
        """Let it be `at`, where it is earlier."""
        self._begin -= max(0.0, at - self.now())


def stepped(pipe: Pipeline, coming: Sequence[Arrival], rows: int) -> list[float]:
    """Seconds from the arrival of each to its picture, by the server's scheduler."""
    model, clock = Model("model", pipe), Clock()
    scheduler = Scheduler(Models([model]), most_rows=rows, queue=len(coming), clock=clock.now)
    ended = [0.0] * len(coming)

    def submit(i: int) -> None:
        def listen(event: Event) -> None:
            if isinstance(event, Ended):
                ended[i] = clock.now()

        ticket = Ticket(model, pipe.job(coming[i].request), client=str(i))
        ticket.listeners.append(listen)
        scheduler.submit(ticket)

    here, is_busy = 0, False
    while here < len(coming) or is_busy:
        if not is_busy:
            clock.skip_to(coming[here].at)
        while here < len(coming) and coming[here].at <= clock.now():
            submit(here)
            here += 1
        is_busy = scheduler.round()
    return [end - each.at for end, each in zip(ended, coming, strict=True)]


def batched(pipe: Pipeline, coming: Sequence[Arrival], rows: int, *, same_steps: bool) -> list[float]:
    """The same, by batches that are drawn to their end before the next one begins."""
    alike = [(pipe.kind(pipe.job(each.request)), each.request.steps if same_steps else None) for each in coming]
    clock, here = Clock(), 0
    ended = [0.0] * len(coming)
    waiting: list[int] = []
    while here < len(coming) or waiting:
        if not waiting:
            clock.skip_to(coming[here].at)
        while here < len(coming) and coming[here].at <= clock.now():
            waiting.append(here)
            here += 1
        batch = [i for i in waiting if alike[i] == alike[waiting[0]]][:rows]
        waiting = [i for i in waiting if i not in batch]
        pipe.generate_many([coming[i].request for i in batch])
        for i in batch:
            ended[i] = clock.now()
    return [end - each.at for end, each in zip(ended, coming, strict=True)]


WAYS: dict[str, Callable[[Pipeline, Sequence[Arrival], int], list[float]]] = {
    "stepped": stepped,
    "batched": lambda pipe, coming, rows: batched(pipe, coming, rows, same_steps=False),
    "batched, same steps": lambda pipe, coming, rows: batched(pipe, coming, rows, same_steps=True),
}
HEAD = ("load", "way", "4 steps: p50", "p99", "20 steps: p99", "50 steps: p50", "p99", "pictures/s")
_HEADING = f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}"
_SHOWN = ((SHORT, "p50"), (SHORT, "p99"), (MIDDLE, "p99"), (LONG, "p50"), (LONG, "p99"))


def measure(pipe: Pipeline, mix: Mix, rows: int, count: int, turns: int) -> Iterator[Measured]:
    """Each load, drawn in each way. rows: the most of a batch. count: requests of a turn."""
    for way in WAYS.values():  # engines are loaded, and caches warm
        way(pipe, mix.arrivals(2 * rows, 0.0, 0), rows)
    capacity = 0.0
    for share in (None, 0.5, 0.7, 0.9):
        found: dict[str, list[tuple[int, float]]] = {name: [] for name in WAYS}
        rates: dict[str, list[float]] = {name: [] for name in WAYS}
        rate = (share or 0.0) * capacity
        for turn in range(turns):
            coming = mix.arrivals(count, rate, turn)
            for name, way in WAYS.items():
                seconds = way(pipe, coming, rows)
                found[name] += zip([each.request.steps or 0 for each in coming], seconds, strict=True)
                rates[name].append(count / max(each.at + own for each, own in zip(coming, seconds, strict=True)))
        capacity = capacity or median(rates["batched"])
        for name in WAYS:
            yield Measured(share, rate, name, _latencies(found[name]), median(rates[name]))


def _latencies(found: Sequence[tuple[int, float]]) -> dict[str, dict[str, float]]:
    """Percentiles in ms, by the number of steps."""
    own = {steps: [1000 * seconds for each, seconds in found if each == steps] for steps in STEPS}
    return {
        str(steps): {f"p{share}": percentile(values, share) for share in _PERCENTILES}
        for steps, values in own.items()
        if values
    }


def row(measured: Measured) -> str:
    """A row of the table."""
    shown = [measured.latency_ms.get(steps, {}).get(share) for steps, share in _SHOWN]
    cells = ["–" if value is None else f"{value:.0f}" for value in shown]
    return f"| {' | '.join([measured.name, measured.way, *cells, f'{measured.images_per_s:.2f}'])} |"


def main() -> None:
    """Print the table, and keep and draw it where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", nargs="?", help="what is measured; without it the file of --json is read")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sizes", default="64x64,96x64")
    parser.add_argument("--control", help="a control of the bundle")
    parser.add_argument("--lora", help="a LoRA, of a bundle that takes them as inputs")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("--plot", type=Path, help="draw them into this .png or .svg file")
    asked = parser.parse_args()
    try:
        _check(asked)
        found = _read(asked.json) if asked.bundle is None else _measured(asked)
        if asked.plot:
            serving_plot.write(found, asked.plot)
    except DiffoundryError as error:
        parser.exit(1, f"Error: {' '.join(str(error).split())}\n")


def _check(asked: argparse.Namespace) -> None:
    """Raise `DiffoundryError` for what would only fail after the measurement."""
    if asked.bundle is None and asked.json is None:
        raise BenchError("name a bundle to measure, or by --json the file of an earlier run to show")
    if min(asked.rows, asked.requests, asked.turns) < 1:
        raise BenchError("--rows, --requests and --turns must be 1 or more")
    if not re.fullmatch(r"\d{1,5}x\d{1,5}(,\d{1,5}x\d{1,5})*", asked.sizes):
        raise BenchError(
            f"--sizes takes sizes with commas between them, such as 64x64,96x64, found {asked.sizes!r:.60}"
        )
    if asked.json and not asked.json.absolute().parent.is_dir():
        raise BenchError(f"the folder {asked.json.parent} does not exist: make it, or choose another --json")
    if asked.plot:
        plot.check(asked.plot)


def _measured(asked: argparse.Namespace) -> list[Measured]:
    """Measure, print each row as it comes, and keep them."""
    kinds: list[dict[str, Any]] = [{}]
    if asked.control:
        edges = np.zeros((64, 64, 3), np.uint8)
        edges[20:44, 20:44] = 255
        kinds.append({"control": [Control(asked.control, edges)]})
    if asked.lora:
        kinds.append({"loras": [Lora(asked.lora, 0.7)]})
    sizes = tuple((int(width), int(height)) for width, height in (each.split("x") for each in asked.sizes.split(",")))
    pipe, mix, found = load(asked.bundle, threads=1), Mix(sizes, tuple(kinds)), []
    print(_HEADING, flush=True)
    for each in measure(pipe, mix, asked.rows, asked.requests, asked.turns):
        print(row(each), flush=True)
        found.append(each)
    if asked.json:
        about = {name: getattr(asked, name) for name in ("rows", "requests", "turns", "sizes", "control")}
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        of = {"date": date, "processor": processor(), "with_lora": bool(asked.lora), **about}
        write_json(asked.json, {**of, "measured": [asdict(each) for each in found]})
    return found


def _read(path: Path) -> list[Measured]:
    """What an earlier run kept, printed again. Raises `DiffoundryError`."""
    try:
        found = [read(Measured, each) for each in read_json(path, "the measurement")["measured"]]
    except (FieldError, KeyError, TypeError) as error:
        raise BenchError(f"{path} is no measurement of this command ({error}): measure again, with a bundle") from None
    print("\n".join([_HEADING, *(row(each) for each in found)]))
    return found


if __name__ == "__main__":
    main()
