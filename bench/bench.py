"""A run of `diffoundry bench`: verify, start, draw in turns, compare the pictures, and say what limits the machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle import FULL, Bundle
from ..bundle.manifest import MANIFEST_NAME
from ..common.arrays import Array
from ..common.errors import BenchError, BundleError, DiffoundryError
from ..common.files import read_json, sha256_file
from ..common.interrupts import Interrupts, noting_interrupts
from ..common.machine import trim_memory
from ..common.progress import Meter, Progress
from ..engines.loader import EngineLoader
from ..engines.names import ONNXRUNTIME
from ..engines.verify import verify
from ..families import open_bundle
from . import machine
from .components import components_of
from .drawing import versions
from .options import Options, settings_of
from .pictures import difference
from .report import OURS, BundleSummary, Cold, Report, Scenario, Settings, System, Turn
from .scenarios import offline, server
from .session import Drawn, Session, Task, session
from .timing import further_step, median, ratio

LEAST_TURNS, MOST_TURNS, TURNS_S = 5, 100, 60.0
"""Turns where none are asked for: as many as take so many seconds, within these limits."""
DIFFUSERS = "diffusers"
_SHORT_S = 0.25
"""What a system needs at most to find its way back into the caches, for the clocks to rise and threads to wake up."""
_SLOW_S = 5.0
"""A first call of more seconds is warm-up enough."""
_SLACK = 3.0
"""Times the median latency: the limit of the scenario `server` where none is given."""
_QUIET = 0.25
"""Of the cores, busy with other things before the run, above which a note says so."""


def measure(options: Options, keep: Callable[[Report], None], progress: Progress | None = None) -> Report:
    """Measure, and hand the report to `keep`: also when the run is interrupted or our own system fails, as it stands.

    A peer that is missing, fails, or cannot do this precision is a row that says why.
    Raises `DiffoundryError`: before anything is measured for a bundle that is damaged or cannot draw this, and for what
    `verify` finds; later when our own system fails.
    """
    meter = Meter(progress, 6 + len(dict.fromkeys(options.versus)))
    run = _Run(options, meter)
    complete = False
    try:
        with tempfile.TemporaryDirectory(prefix="diffoundry-bench-") as folder, noting_interrupts() as came:
            run.all(Path(folder), came)
        complete = True
    except DiffoundryError as error:
        run.failed(error)
        raise
    finally:
        report = run.report(complete)
        keep(report)
    meter.end()
    return report


@dataclass(slots=True)
class _Row:
    """A system as it is measured, and its picture."""

    system: System
    picture: Array | None = None
    turns: list[Turn] = field(default_factory=list)
    cold: list[Cold] = field(default_factory=list)

    def told(self, **more: Any) -> None:
        self.system = replace(self.system, **more)


class _Run:
    """What was measured so far."""

    def __init__(self, options: Options, meter: Meter) -> None:
        """Open the bundle and hold the request against it; nothing is measured. Raises `DiffoundryError`."""
        self._options, self._meter = options, meter
        self._bundle = open_bundle(options.bundle)
        if options.checkpoint is not None:
            _check_checkpoint(self._bundle, options.checkpoint)
        loader = EngineLoader(self._bundle, options.engine, options.precision)
        self._engine, self._precision_of = loader.engine, loader.precision_of
        self._settings, self._latents = settings_of(options, self._bundle, str(loader.engine), loader.precision)
        self._machine = machine.describe(loader.engine, versions())
        self._meter.show("verify")
        _check(self._bundle, self._settings)
        self._meter.step()
        self._rows: dict[str, _Row] = {}
        self._scenario = Scenario(options.scenario)
        self._drawn: list[Drawn] = []
        self._reference = ""
        self._notes: list[str] = []
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        load, cores = self._machine.load, self._machine.cores
        if load is not None and load > _QUIET * cores:
            self._notes.append(
                f"the load of the machine was {load:g} on {cores} cores when it began: figures may be low"
            )

    def report(self, complete: bool) -> Report:
        """What was measured so far."""
        manifest, root = self._bundle.manifest, self._bundle.root
        components, missing = components_of(self._bundle, self._drawn, self._precision_of, self._machine.peaks)
        return Report(
            date=self._date,
            complete=complete,
            command=self._options.command,
            bundle=BundleSummary(
                root.resolve().name, manifest.family, manifest.source.get("name", ""), sha256_file(root / MANIFEST_NAME)
            ),
            request=self._settings,
            machine=self._machine,
            systems=tuple(
                replace(row.system, cold=tuple(row.cold), turns=tuple(row.turns)) for row in self._rows.values()
            ),
            components=components,
            scenario=self._scenario,
            reference=self._reference,
            notes=(*self._notes, *missing),
        )

    def all(self, folder: Path, interrupts: Interrupts) -> None:
        """Measure. folder: for pictures on their way. interrupts: heeded before each turn, see `noting_interrupts`."""
        self._interrupts = interrupts
        task = Task(self._bundle, self._options.checkpoint, self._settings, folder, self._latents)
        self._measure_peaks()
        versus = list(dict.fromkeys(self._options.versus))
        with ExitStack() as stack:
            ours = self._started(stack, OURS, task)
            self._meter.step()
            for name in versus:
                with _noted(self._row(name)), ExitStack() as own:
                    self._turns(ours, self._started(own, name, task), len(versus))
                self._meter.step()
            if not versus or not self._rows[OURS].turns:
                self._turns(ours, None, 1)
            self._meter.step()
            _ended(self._rows[OURS], ours)
        self._compare(task)
        self._meter.step()
        self._run_scenario(task, [OURS, *versus])
        self._meter.step()

    def failed(self, error: DiffoundryError) -> None:
        """Say in our own row why the run ended."""
        self._row(OURS).told(error=" ".join(str(error).split()))

    def _row(self, name: str) -> _Row:
        """The row of a system, added on first use."""
        if name not in self._rows:
            title = f"diffoundry, {self._engine}"
            if name != OURS:
                from . import peers

                title = peers.PEERS[name].title
            self._rows[name] = _Row(System(name, title, self._settings.precision))
        return self._rows[name]

    def _measure_peaks(self) -> None:
        self._meter.show("peaks of the machine")
        threads, precision = self._settings.threads, self._settings.precision
        found, missing = machine.peaks(self._engine, [FULL, precision] if precision != FULL else [FULL], threads)
        self._machine = replace(self._machine, peaks=found)
        self._notes += missing
        self._meter.step()

    def _started(self, stack: ExitStack, name: str, task: Task) -> Session:
        """A system after its cold starts; the last one goes on. Its first pictures are drawn. Raises `BenchError`."""
        row, precision = self._row(name), self._settings.precision
        if name != OURS:
            _check_precision(name, precision)
        for k in range(max(1, self._options.cold)):
            self._meter.show(f"{row.system.title}: start {k + 1}", k / max(1, self._options.cold))
            with ExitStack() as own:
                begun = own.enter_context(session(name, task, precision))
                if begun.convert_s:  # this once it has made what later starts find
                    row.told(info={**row.system.info, "convert_s": begun.convert_s})
                    own.close()
                    begun = own.enter_context(session(name, task, precision))
                drawn = begun.draw(1, by_step=True)
                if self._options.cold:
                    row.cold.append(begun.cold(drawn))
                row.told(versions=begun.versions, info={**row.system.info, **begun.info})
                if k + 1 >= self._options.cold:
                    stack.push(own.pop_all())
        if drawn.turn.seconds < _SLOW_S:
            begun.draw(1)
        row.picture = begun.picture(1)
        if name == OURS:
            self._note_rows(drawn)
        return begun

    def _note_rows(self, drawn: Drawn) -> None:
        """How many rows of the denoiser a step has."""
        denoiser = self._bundle.manifest.named("denoiser")
        rows = [next(iter(each["shapes"].values()))[0] for each in drawn.calls if each["component"] == denoiser]
        guessed = self._settings.count * (2 if self._settings.guidance > 1 else 1)
        self._settings = replace(self._settings, rows=max(rows, default=guessed))

    def _turns(self, ours: Session, theirs: Session | None, peers_in_all: int) -> None:
        """Draw in turns, ours and theirs; the ratio is taken pair by pair. Raises `BenchError`."""
        own, other = self._rows[OURS], None if theirs is None else self._rows[theirs.name]
        total, k = self._options.turns, 0
        pairs: list[tuple[Turn, Turn]] = []
        while total is None or k < total:
            self._interrupts.heed()
            self._meter.show(f"{(other or own).system.title}: turn {k + 1}", 0 if total is None else k / total)
            start = time.perf_counter()
            drawn = _ours(ours)
            own.turns.append(drawn.turn)
            self._drawn.append(drawn)
            if theirs is not None and other is not None:
                turn = _warm(theirs).turn
                other.turns.append(turn)
                pairs.append((turn, drawn.turn))
                other.told(ratio=ratio(*_seconds(pairs)), ratio_step=ratio(*_further(pairs)))
            k += 1
            if total is None:
                seconds = time.perf_counter() - start
                total = min(max(int(TURNS_S / peers_in_all / seconds), LEAST_TURNS), MOST_TURNS)
                self._settings = replace(self._settings, turns=total)
        own.picture = ours.picture(1)
        if theirs is not None and other is not None:
            other.picture = theirs.picture(1)
            _ended(other, theirs)

    def _compare(self, task: Task) -> None:
        """Hold every picture against the reference."""
        self._meter.show("comparing pictures")
        reference, name = self._reference_picture(task)
        if reference is None:
            self._notes.append("the pictures were compared with nothing: no system drew one in fp32")
            return
        for row in self._rows.values():
            if row.picture is not None and row.picture is not reference:
                psnr, levels = difference(row.picture, reference)
                row.told(psnr_db=psnr, max_levels=levels, changes_picture=levels > 1)
        self._reference = name

    def _reference_picture(self, task: Task) -> tuple[Array | None, str]:
        """The picture of diffusers in fp32 where that runs, else ours in fp32 by ONNX Runtime; and whose it is."""
        ours = self._settings.precision, self._settings.engine
        candidates = [(DIFFUSERS, None)] if DIFFUSERS in self._rows else []
        for name, engine in [*candidates, (OURS, ONNXRUNTIME)]:
            row = self._rows[name]
            title = f"{name}, {FULL}" if engine is None or ours == (FULL, engine) else f"{name}, {engine}, {FULL}"
            if self._settings.precision == FULL and (name != OURS or ours == (FULL, engine)):
                if row.picture is not None:
                    return row.picture, title
                continue
            try:
                with session(name, task, FULL, engine) as begun:
                    begun.draw(1)
                    return begun.picture(1), title
            except DiffoundryError as error:
                self._notes.append(f"{title} drew no reference: {error}")
        return None, ""

    def _run_scenario(self, task: Task, names: Sequence[str]) -> None:
        name = self._options.scenario
        if name == "single":
            return
        if name == "server" and self._settings.p99_s is None:
            alone = median([turn.seconds for turn in self._rows[OURS].turns])
            self._settings = replace(self._settings, p99_s=_SLACK * alone)
        task = replace(task, settings=self._settings)
        for each in names:
            row = self._rows[each]
            if row.system.error is not None:
                continue
            with _noted(row) if each != OURS else ExitStack(), session(each, task, row.system.precision) as begun:

                def tell(what: str, title: str = row.system.title) -> None:
                    self._meter.show(f"{title}: {what}")

                if name == "offline":
                    made = offline(begun, self._settings, tell)
                    self._scenario = replace(self._scenario, offline=(*self._scenario.offline, made))
                else:
                    served = server(begun, self._settings, tell)
                    self._scenario = replace(self._scenario, server=(*self._scenario.server, served))


@contextmanager
def _noted(row: _Row) -> Iterator[None]:
    """What a peer fails with is told in its row, and the others go on."""
    try:
        yield
    except _OursFailed:
        raise
    except DiffoundryError as error:
        row.told(error=" ".join(str(error).split()))


class _OursFailed(BenchError):
    """Our own system failed while a peer was measured."""


def _warm(of: Session) -> Drawn:
    """A picture by a system at work: one that is not counted goes before a short one.

    Its caches, clocks and threads are then those of a system that is used.
    """
    if of.seconds >= _SHORT_S:
        return of.draw(1)
    of.draw(1)
    return of.draw(1, pause=False)


def _ours(ours: Session) -> Drawn:
    try:
        return _warm(ours)
    except BenchError as error:
        raise _OursFailed(str(error)) from None


def _check(bundle: Bundle, settings: Settings) -> None:
    """Raise `BundleError` when the bundle does not give what torch gave: its speed would be of no use."""
    checks = verify(bundle, engine=settings.engine, precision=settings.precision, threads=settings.threads)
    failed = [check.component for check in checks if not check.passed]
    trim_memory()
    if failed:
        raise BundleError(
            f"{bundle.root}: {', '.join(dict.fromkeys(failed))} no longer gives what torch gave, so it is not timed: "
            "compile the bundle again on this machine"
        )


def _check_checkpoint(bundle: Bundle, checkpoint: Path) -> None:
    """Raise `BenchError` where `checkpoint` is none, or its denoiser is another kind than that of `bundle`."""
    name = bundle.manifest.named("denoiser")
    own, other = bundle.component(name).files.get(f"{name}/config.json"), checkpoint / name / "config.json"
    if own is not None and (not other.is_file() or sha256_file(other) != own):
        raise BenchError(
            f"{checkpoint} is not what {bundle.root} was compiled from: its {name}/config.json is another one; give "
            "--checkpoint the folder that was compiled"
        )
    index = checkpoint / "model_index.json"
    if not isinstance(read_json(index, "the index of the checkpoint").get("_class_name"), str):
        raise BenchError(f"{index} names no pipeline: give --checkpoint the folder that was compiled")


def _check_precision(name: str, precision: str) -> None:
    from . import peers

    known = peers.precisions(name)
    if precision not in known:
        raise BenchError(f"{name} runs in {', '.join(known)}, not in {precision}")


def _ended(row: _Row, begun: Session) -> None:
    peak = begun.end()
    row.told(peak_rss_bytes=peak["peak_rss"], peak_gpu_bytes=peak["peak_gpu"])


def _seconds(pairs: Iterable[tuple[Turn, Turn]]) -> tuple[list[float], list[float]]:
    theirs, ours = zip(*((a.seconds, b.seconds) for a, b in pairs), strict=True)
    return list(theirs), list(ours)


def _further(pairs: Iterable[tuple[Turn, Turn]]) -> tuple[list[float], list[float]]:
    """The median further step of each, of the turns in which both tell."""
    steps = [(a, b) for pair in pairs if (a := further_step(pair[0])) and (b := further_step(pair[1]))]
    return [a for a, _ in steps], [b for _, b in steps]
