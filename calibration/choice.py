"""The choice of an engine by time: those that are installed are tried on this processor, in steps of the loop."""

from __future__ import annotations

import gc
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from ..bundle import FULL, Bundle
from ..bundle.ledger import Kind, Ledger
from ..bundle.manifest import Files
from ..bundle.reports import read_report, with_report
from ..common.errors import EngineError
from ..common.files import sha256_json
from ..common.machine import available_memory, processor
from ..common.progress import Meter
from ..engines.initializers import read_initializers
from ..engines.names import ONNXRUNTIME, OPENVINO, EngineName
from ..engines.onnxruntime import default_threads
from ..engines.openvino.device import module, version
from ..engines.openvino.device import precisions as precisions_of
from ..engines.wheel import ort
from ..runtime.pipeline import Pipeline
from .hinted import lowered, measure
from .quality import QualityError
from .scan import Scan, requests
from .stage import decides

AUTO = "auto"
"""Stands for the engine that is the fastest here."""
REPORT = "engines"
_REVISION = 1
_LEAST_CALLS, _MOST_CALLS, _SECONDS = 3, 50, 2.0
_IN_MEMORY = 2.0
"""Of the bytes of weights in float32, what a session of ONNX Runtime takes: as they are, and packed."""
_WORTH = 0.95
"""A candidate is taken over one before it when its time is under this part of the other's: less may be noise."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate: the median time of a step of the loop, in seconds, or why it is out.

    psnr_db: of its images to fp32, the median; 0 where it was not measured.
    """

    engine: str
    precision: str
    seconds: float = 0.0
    calls: int = 0
    psnr_db: float = 0.0
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, of which candidates, on which processor. untimed: why none was timed, "" where they were."""

    engine: str
    precision: str
    processor: str
    threads: int
    trials: tuple[Trial, ...]
    untimed: str = ""

    def all_files(self) -> Files:
        """None of its own."""
        return {}


CHOICE = Kind(Choice, Choice.all_files)
RECORD = "choice"


def candidates(lower: bool) -> list[tuple[str, str]]:
    """The engines and precisions that can be tried here, those of more machines first. lower: also under fp32."""
    found = [(ONNXRUNTIME, FULL)]
    try:
        able = precisions_of()
    except EngineError:
        return found
    return found + [(OPENVINO, name) for name in able if name == FULL or (lower and name == "bf16")]


def choose(bundle: Bundle, ledger: Ledger, lower: bool, scan: Scan, meter: Meter) -> tuple[Bundle, EngineName, str]:
    """The fastest engine for `bundle`, which lies in the ledger's working folder, and its precision.

    lower: whether a precision under fp32 may be chosen, where its images are within the budget of `scan`. The bundle
    comes back with the report `engines`, where there was more than one to choose from.
    """
    tried = candidates(lower)
    if len(tried) == 1:
        meter.step()
        return with_report(bundle, REPORT, {}) if REPORT in bundle.manifest.files else bundle, *_parsed(*tried[0])
    lacking = _lacking_memory(bundle)
    if lacking:
        meter.step()
        untimed = Choice(*tried[0], processor(), default_threads(), (), lacking)
        return with_report(bundle, REPORT, asdict(untimed)), *_parsed(*tried[0])
    key = sha256_json(
        {
            "revision": _REVISION,
            "candidates": tried,
            "machine": [processor(), default_threads()],
            "versions": [str(ort.__version__), version(module())],
            "scan": {**asdict(scan), **scan.record(bundle)} if lower else None,
            **decides(bundle),
        }
    )
    made = ledger.find(RECORD, key, CHOICE)
    if made is None:
        made = ledger.keep(RECORD, key, _tried(bundle, ledger, tried, scan, meter))
    else:
        meter.step()
    engine, precision = _parsed(made.engine, made.precision)
    if precision != FULL:
        bundle = measure(bundle, ledger, engine, precision, scan, meter, parts=0)
    return (
        with_report(bundle, REPORT, {**asdict(made), "trials": [asdict(each) for each in made.trials]}),
        engine,
        precision,
    )


def _lacking_memory(bundle: Bundle) -> str:
    """Why steps of the loop cannot be timed, "" where they can: text encoders and denoiser are in memory together."""
    manifest, free = bundle.manifest, available_memory()
    weights = 0
    for name in [*manifest.with_role("text"), manifest.named("denoiser")]:
        variant = manifest.components[name].variant(FULL, f"{ONNXRUNTIME}:cpu")
        assert variant is not None  # every component has one
        weights += sum(
            4 * math.prod(each.shape) if each.is_float else each.length
            for each in read_initializers(bundle.path(variant.model)).values()
        )
    if free is None or weights * _IN_MEMORY <= free:
        return ""
    return f"it takes about {weights * _IN_MEMORY / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"


def describe(report: dict[str, Any]) -> str:
    """The choice in words, as the command line prints it."""
    try:
        if report.get("untimed"):
            return (
                f"{report['engine']} in {report['precision']}, no engine was timed: {report['untimed']}; `build` times "
                "them where there is more, --engine overrides"
            )
        times = ", ".join(
            f"{each['engine']} {each['precision']} {_time(each['seconds'])}"
            + (f" ({each['refused']})" if each["refused"] else "")
            for each in report["trials"]
        )
        return (
            f"{report['engine']} in {report['precision']} is the fastest here (a step of the loop: {times}); "
            "--engine overrides"
        )
    except (KeyError, TypeError, ValueError):
        return "the report on engines is damaged"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _tried(bundle: Bundle, ledger: Ledger, tried: list[tuple[str, str]], scan: Scan, meter: Meter) -> Choice:
    trials: list[Trial] = []
    best: Trial | None = None
    for engine, precision in tried:
        meter.show(f"time of {engine} {precision}")
        try:
            seconds = times(lowered(bundle, EngineName.parse(engine), precision), engine, precision)
        except EngineError as error:
            trials.append(Trial(engine, precision, refused=str(error)))
            continue
        trial = Trial(engine, precision, float(f"{median(seconds):.6g}"), len(seconds))
        faster = best is None or trial.seconds < _WORTH * best.seconds
        if faster and precision != FULL:
            trial = _within_budget(bundle, ledger, trial, scan, meter)
        best = trial if faster and not trial.refused else best
        trials.append(trial)
    meter.step()
    if best is None:
        raise EngineError(f"no engine here runs the denoiser: {trials[0].refused}")
    return Choice(best.engine, best.precision, processor(), default_threads(), tuple(trials))


def _within_budget(bundle: Bundle, ledger: Ledger, trial: Trial, scan: Scan, meter: Meter) -> Trial:
    """`trial` with the distance of its images from fp32, refused where that is too much."""
    try:
        made = measure(bundle, ledger, EngineName.parse(trial.engine), trial.precision, scan, meter, parts=0)
    except QualityError as error:
        return replace(trial, refused=str(error))
    quality = read_report(made, "quality")[f"{trial.precision}/{trial.engine}"]
    return replace(trial, psnr_db=quality["psnr_db"])


def times(bundle: Bundle, engine: str, precision: str) -> list[float]:
    """Seconds of steps of the loop at the bundle's own size, guided where that is its default, but for the first."""
    pipeline = Pipeline(bundle, engine=engine, precision=precision)
    request = replace(requests(bundle, Scan())[0], output="latent")
    taken: list[float] = []
    first = True
    while len(taken) < _LEAST_CALLS or (sum(taken) < _SECONDS and len(taken) < _MOST_CALLS):
        with closing(pipeline.steps(request)) as steps:
            start = time.perf_counter()
            for _ in steps:
                now = time.perf_counter()
                taken += [] if first else [now - start]
                start, first = now, False
                if len(taken) >= _MOST_CALLS or (len(taken) >= _LEAST_CALLS and sum(taken) >= _SECONDS):
                    break
    pipeline.release_all()
    gc.collect()  # the next one's weights come into the place of these
    return taken


def _parsed(engine: str, precision: str) -> tuple[EngineName, str]:
    return EngineName.parse(engine), precision
