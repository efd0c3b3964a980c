"""`bench --serve`: a server that runs, measured from outside, with requests that come whether it keeps up or not."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..common.errors import BenchError
from ..common.files import write_json
from ..common.interrupts import Interrupts, noting_interrupts
from ..common.progress import Meter, Progress
from ..engines.names import ONNXRUNTIME, EngineName
from . import machine
from .client import Client, Outcome
from .drawing import versions
from .mix import PROMPTS, Arrival, Kind, arrivals
from .report import Machine
from .timing import percentile
from .units import plain

SCHEMA_VERSION = 1
OWNER = "diffoundry"
"""Whose models are those of `diffoundry serve`."""
PERCENTILES = (50, 90, 99)
_SLACK = 3.0
"""Times the slowest kind alone: the limit where none is given."""
_LIMITS, _MOST_REQUESTS = 10.0, 1000
"""A rate that is tried lasts so many limits, so that a queue that grows is seen; but it has no more requests."""
_TAIL = 0.01
_DOUBLINGS, _HALVINGS, _BISECTIONS = 8, 3, 4
_SLOW_S = 5.0
"""A first request that takes longer is not asked again to know how long it takes alone."""
_LATE_S = 0.05
"""Requests that go out later than this after their time are those of a client that does not keep up."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for. base: see `client.base_of`. rates: requests a second; () searches for the highest one whose
    p99 is within `p99_s`, in seconds; None is three times the slowest kind alone.

    requests: of each rate, at least. partial: pictures on their way, 0 for answers without a stream. keys: [""] for
    none. prompt: of requests whose kind says none.
    """

    base: str
    kinds: tuple[Kind, ...]
    rates: tuple[float, ...] = ()
    requests: int = 100
    p99_s: float | None = None
    partial: int = 1
    keys: tuple[str, ...] = ("",)
    prompt: str | None = None
    seed: int = 7
    command: str = "diffoundry bench"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what became of it. at: seconds after the begin at which it came; the other times are from then on.

    kind: the place of its kind. late_s: until it was sent. first_s, last_s: until its first picture, partial or whole,
    and until its last one; None where it has none. status: of HTTP, 0 where there was no answer. error: "" or why there
    is no picture. retry_after_s: what a refusal says.
    """

    at: float
    kind: int
    late_s: float
    first_s: float | None
    last_s: float | None
    images: int
    status: int
    error: str
    retry_after_s: float | None

    @property
    def is_drawn(self) -> bool:
        """Whether it has its pictures."""
        return not self.error and self.last_s is not None

    @property
    def is_refused(self) -> bool:
        """Whether the server had no room for it."""
        return self.status == 429


@dataclass(frozen=True, slots=True)
class Figures:
    """What requests came to. first_s, last_s: `PERCENTILES` of those that were drawn; None where there are none.

    retry_after_s: the least and the most that refusals say. late_s: the 99th percentile of what this client was late.
    images_per_s: pictures over the time from the first arrival planned to the last picture.
    """

    sent: int
    drawn: int
    refused: int
    failed: int
    first_s: dict[str, float] | None
    last_s: dict[str, float] | None
    retry_after_s: tuple[float, float] | None
    late_s: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class Tried:
    """A rate. complete: False where it was left early, because it was clear that it does not hold.

    holds: whether all were drawn, and the p99 is within the limit; None where there is none.
    """

    rate: float
    complete: bool
    holds: bool | None
    all: Figures
    kinds: tuple[Figures, ...]
    requests: tuple[Asked, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A run of `bench --serve`. machine: that of the client. kinds: as they are written, with their shares and the
    seconds that one takes alone. rate_per_s: the highest that was tried and holds `p99_s`, 0 where none does, None
    where no limit was asked for; images_per_s: what it drew.
    """

    date: str
    complete: bool
    command: str
    url: str
    models: tuple[str, ...]
    machine: Machine
    kinds: tuple[dict[str, Any], ...]
    seed: int
    partial_images: int
    keys: int
    p99_s: float | None = None
    rate_per_s: float | None = None
    images_per_s: float | None = None
    tried: tuple[Tried, ...] = ()
    notes: tuple[str, ...] = ()
    serve_schema_version: int = SCHEMA_VERSION


def to_json(report: Report) -> dict[str, Any]:
    """The report as a JSON object, schema version first."""
    value = asdict(report)
    return {"serve_schema_version": value.pop("serve_schema_version"), **value}


def save(report: Report, path: Path) -> None:
    """Write the report beside `path` and rename it into place. Raises `OSError`."""
    write_json(path, to_json(report))


def measure(options: Options, keep: Callable[[Report], None], progress: Progress | None = None) -> Report:
    """Measure a server, and hand the report to `keep`: also when the run is interrupted, as it stands.

    Raises `DiffoundryError` where there is no server, or it refuses a key, a model or a kind of request: nothing was
    measured then, and nothing is kept.
    """
    run = _Run(options, progress)
    complete = False
    try:
        with noting_interrupts() as came:
            asyncio.run(run.all(came))
        complete = True
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        if run.tried or complete:
            report = run.report(complete)
            keep(report)
    return report


class _Run:
    """What was measured so far."""

    def __init__(self, options: Options, progress: Progress | None) -> None:
        self._options, self.tried = options, list[Tried]()
        self._client = Client(options.base, list(options.keys))
        self._meter = Meter(progress, 1 + (len(options.rates) or 2 + _BISECTIONS))
        self._machine = machine.describe(EngineName.parse(ONNXRUNTIME), versions())
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._models: dict[str, str] | None = None
        self._alone: list[float] = []
        self._limit = options.p99_s
        self._prompts = PROMPTS if options.prompt is None else (options.prompt,)

    def report(self, complete: bool) -> Report:
        """What was measured so far."""
        options, held = self._options, [each for each in self.tried if each.holds]
        best = max(held, key=lambda each: each.rate, default=None)
        rate, images = (0.0, 0.0) if best is None else (best.rate, best.all.images_per_s)
        return Report(
            date=self._date,
            complete=complete,
            command=options.command,
            url=options.base,
            models=tuple(self._models or ()),
            machine=self._machine,
            kinds=tuple(
                {"text": kind.text, "share": kind.share, "alone_s": alone}
                for kind, alone in zip(options.kinds, self._alone, strict=True)
            ),
            seed=options.seed,
            partial_images=options.partial,
            keys=len([key for key in options.keys if key]),
            p99_s=self._limit,
            rate_per_s=None if self._limit is None else rate,
            images_per_s=None if self._limit is None else images,
            tried=tuple(self.tried),
            notes=tuple(self._notes()),
        )

    async def all(self, interrupts: Interrupts) -> None:
        """Measure. interrupts: heeded between arrivals."""
        self._interrupts = interrupts
        _cancel_by(interrupts)
        async with self._client:
            self._meter.show("asking for the models")
            await self._check_models()
            await self._warm()
            self._meter.step()
            if self._options.rates:
                for rate in self._options.rates:
                    await self._try(rate)
                    self._meter.step()
            else:
                await self._search()
        self._meter.end()

    def _notes(self) -> list[str]:
        late = max((each.all.late_s for each in self.tried), default=0.0)
        notes = []
        if late > _LATE_S:
            notes.append(
                f"this client sent 1 of 100 requests more than {1000 * late:.0f} ms after its time, which counts as "
                "the server's: measure from a machine with a free core"
            )
        if self._models is None:
            notes.append("the server does not list its models: their names were not checked")
        return notes

    async def _check_models(self) -> None:
        """Raise `BenchError` where there is no server, where it refuses a key, or lacks a model."""
        for key in range(len(self._options.keys)):
            self._models = await self._client.models(key)
        named = [model for kind in self._options.kinds for model in kind.fields.get("model", ())]
        missing = [model for model in named if self._models is not None and model not in self._models]
        if missing:
            raise BenchError(
                f"{self._options.base} has no model {missing[0]!r:.100}, only {plain(', '.join(self._models or ()))}: "
                "name one of these in --mix"
            )

    async def _warm(self) -> None:
        """Draw each combination once, which loads what it needs, and take the time of each kind alone.

        Raises `BenchError` for one that is refused.
        """
        for kind in self._options.kinds:
            combinations, taken = kind.each(), 0.0
            for number, fields in enumerate((*combinations, combinations[0])):
                self._meter.show(f"alone: {kind.text} {number + 1}/{len(combinations) + 1}")
                self._interrupts.heed()
                if number < len(combinations) or taken < _SLOW_S:
                    taken = await self._once(kind, fields, number)
            self._alone.append(taken)

    async def _once(self, kind: Kind, fields: dict[str, Any], number: int) -> float:
        asked = self._seeded({"prompt": self._prompts[0], **fields}, number)
        outcome = await self._client.draw(asked, 0, self._options.partial)
        if outcome.error or outcome.last is None:
            status = f", status {outcome.status}" if outcome.status else ""
            raise BenchError(f"{self._options.base} does not draw {kind.text!r:.100}{status}: {outcome.error}")
        return outcome.last - outcome.sent

    def _seeded(self, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """The fields of a request, with a seed where the server is one of ours."""
        is_ours = OWNER in (self._models or {}).values()
        return {**({"seed": (self._options.seed + number) % 2**32} if is_ours else {}), **fields}

    async def _search(self) -> None:
        """Find the highest rate that holds the limit."""
        shares = [kind.share / sum(kind.share for kind in self._options.kinds) for kind in self._options.kinds]
        if self._limit is None:
            self._limit = _SLACK * max(self._alone)
        if sum(part for part, alone in zip(shares, self._alone, strict=True) if alone > self._limit) > _TAIL:
            return
        together = sum(part * alone for part, alone in zip(shares, self._alone, strict=True))

        async def holds(rate: float) -> bool:
            tried = await self._try(rate)
            self._meter.step()
            return bool(tried.holds)

        await highest(1 / max(together, 1e-3), holds)

    async def _try(self, rate: float) -> Tried:
        """Send the requests of a rate. In a search it is left early where it is clear that it does not hold."""
        options, limit = self._options, self._limit
        count, is_searched = options.requests, not options.rates
        if is_searched and limit is not None:
            count = max(count, min(_MOST_REQUESTS, math.ceil(_LIMITS * limit * rate)))
        coming = arrivals(options.kinds, count, rate, options.seed, keys=len(options.keys), prompts=self._prompts)
        outcomes: dict[int, Outcome] = {}
        under_way: set[asyncio.Task[None]] = set()

        async def send(number: int, arrival: Arrival) -> None:
            fields = self._seeded(arrival.fields, number)
            outcomes[number] = await self._client.draw(fields, arrival.key, options.partial)

        def lost() -> bool:
            """Whether so many are too late, or were not drawn, that the rate does not hold."""
            late = [each for each in outcomes.values() if each.error]
            if late or limit is None:
                return bool(late)
            taken = [(each.last or 0.0) - start - coming[i].at for i, each in outcomes.items()]
            return sum(seconds > limit for seconds in taken) > max(1, _TAIL * count)

        start = time.perf_counter()
        try:
            for number, arrival in enumerate(coming):
                self._interrupts.heed()
                self._meter.show(f"{rate:.3g} requests/s: {number}/{count}", number / count / 2)
                await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
                if is_searched and lost():
                    break
                _begin(under_way, send(number, arrival))
            while under_way:
                self._interrupts.heed()
                self._meter.show(f"{rate:.3g} requests/s: {len(outcomes)}/{count}", (1 + len(outcomes) / count) / 2)
                await asyncio.wait(under_way, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in under_way:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*under_way, return_exceptions=True)
            tried = _tried(rate, coming, start, outcomes, limit, len(options.kinds))
            if tried is not None:
                self.tried.append(tried)
        return self.tried[-1]


async def highest(first: float, holds: Callable[[float], Awaitable[bool]]) -> float:
    """The highest rate that holds, within 5 %: from `first` by doubling or halving, and then between the two.

    0 where the lowest that is tried does not hold.
    """
    rate, low, high = first, 0.0, math.inf
    while first / 2**_HALVINGS <= rate <= first * 2**_DOUBLINGS and not (low and high < math.inf):
        if await holds(rate):
            low, rate = rate, 2 * rate
        else:
            high, rate = rate, rate / 2
    for _ in range(_BISECTIONS if low and high < math.inf else 0):
        middle = math.sqrt(low * high)
        if await holds(middle):
            low = middle
        else:
            high = middle
    return low


def _cancel_by(interrupts: Interrupts) -> None:
    """Let an interrupt cancel this task: what it raises where another one runs is taken for a failure of that one."""
    task = asyncio.current_task()

    def cancel() -> None:
        interrupts.note()
        if task is not None:
            task.cancel()

    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, cancel)


def _begin(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _tried(
    rate: float, coming: Sequence[Arrival], start: float, outcomes: dict[int, Outcome], limit: float | None, kinds: int
) -> Tried | None:
    """What a rate came to; None where nothing was sent. start: the begin, by `time.perf_counter`."""
    if not outcomes:
        return None
    asked = [_asked(coming[i], outcome, start) for i, outcome in sorted(outcomes.items())]
    figures = figures_of(asked)
    complete = len(asked) == len(coming)
    holds = None
    if limit is not None:
        p99 = math.inf if figures.last_s is None else figures.last_s["p99"]
        holds = complete and figures.drawn == len(asked) and p99 <= limit
    by_kind = tuple(figures_of([each for each in asked if each.kind == kind]) for kind in range(kinds))
    return Tried(rate, complete, holds, figures, by_kind, tuple(asked))


def _asked(arrival: Arrival, outcome: Outcome, start: float) -> Asked:
    planned = start + arrival.at

    def since(at: float | None) -> float | None:
        return None if at is None else at - planned

    return Asked(
        at=arrival.at,
        kind=arrival.kind,
        late_s=max(0.0, outcome.sent - planned),
        first_s=since(outcome.first),
        last_s=since(outcome.last),
        images=outcome.images,
        status=outcome.status,
        error=outcome.error,
        retry_after_s=outcome.retry_after,
    )


def figures_of(asked: Sequence[Asked]) -> Figures:
    """The figures of some requests."""
    drawn = [each for each in asked if each.is_drawn]
    refused = [each for each in asked if each.is_refused]
    waits = [each.retry_after_s for each in refused if each.retry_after_s is not None]
    ends = max((each.at + (each.last_s or 0.0) for each in drawn), default=0.0)
    return Figures(
        sent=len(asked),
        drawn=len(drawn),
        refused=len(refused),
        failed=len(asked) - len(drawn) - len(refused),
        first_s=_percentiles([each.first_s for each in drawn]),
        last_s=_percentiles([each.last_s for each in drawn]),
        retry_after_s=(min(waits), max(waits)) if waits else None,
        late_s=percentile([each.late_s for each in asked], 99) if asked else 0.0,
        images_per_s=sum(each.images for each in drawn) / ends if ends else 0.0,
    )


def _percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    told = [value for value in values if value is not None]
    return {f"p{share}": percentile(told, share) for share in PERCENTILES} if told else None
