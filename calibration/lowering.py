"""`lower`: a bundle's components in a lower precision, held against float32."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ..bundle import FULL, STANDARD, Bundle
from ..common.arrays import Array
from ..common.errors import DiffoundryError, OverflowedError
from ..common.files import remove, sha256_file
from ..engines import Engine
from ..engines.onnxruntime import load_variant
from .graph import read
from .islands import Island, Islands
from .losses import LOSSLESS
from .precision import MARGIN, Precision, precision_of
from .quality import QualityError, compare, psnr
from .ranges import Ranges
from .scan import Progress, Scan, draw
from .sessions import Calls, Recorded, start
from .typed import CAST, Typed, emulated, write

RULE = 2
"""Raise it when the same measurements would give other types."""
_TRIES = 4
_TIGHTER_DB = 5.0
_MOST_CALLS = 256


def lower(
    bundle: Bundle,
    precision: str,
    *,
    done: Mapping[str, Typed] | None = None,
    scan: Scan | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Typed], dict[str, Any]]:
    """Typed versions of all components of the float32 `bundle` but `step`, and the quality report.

    precision: `fp16` or `bf16`. done: components typed earlier, which are taken as they are. scan: what the loop is
    run with. progress: called as `progress(text, done, total)`.
    The report holds the PSNR of each image in dB, the signal-to-noise ratio of each output in dB, and the tries.
    Raises `QualityError` when the median image is under the scan's budget or one is not finite, whatever stays in
    float32; `DiffoundryError` for an unknown precision, a model that cannot be calibrated or a full disk. It leaves no
    typed file of its own then.
    """
    rule, scan, done = precision_of(precision), scan or Scan(), dict(done or {})
    names = [name for name, part in bundle.manifest.components.items() if part.role != "step"]
    unknown = sorted(set(done) - set(names))
    if unknown:
        raise DiffoundryError(f"{bundle.root} has no component {unknown[0]!r}, only {', '.join(names)}")
    work = _Lowering(bundle, rule, scan, done, [name for name in names if name not in done], progress)
    try:
        return work.run()
    except BaseException:
        work.discard()
        raise


class _Lowering:
    def __init__(
        self,
        bundle: Bundle,
        precision: Precision,
        scan: Scan,
        done: dict[str, Typed],
        fresh: list[str],
        progress: Progress | None,
    ) -> None:
        self._bundle, self._precision, self._scan, self._progress = bundle, precision, scan, progress
        self._done, self._fresh = done, fresh
        self._calls = {name: Calls(_MOST_CALLS) for name in (*done, *fresh)}
        self._typed: dict[str, Typed] = {}

    def run(self) -> tuple[dict[str, Typed], dict[str, Any]]:
        precision = self._precision
        ranges = {name: Ranges(self._model(name), name) for name in self._fresh}
        exact = draw(self._bundle, self._recording(ranges), self._scan, "ranges", self._progress)
        islands = {name: self._islands(name, ranges[name].largest()) for name in self._fresh}
        tries: list[dict[str, Any]] = []
        before: dict[str, list[Island]] | None = None
        for i in range(_TRIES):
            threshold, limit = precision.threshold + i * _TIGHTER_DB, precision.limit / MARGIN**i
            found = {name: each.find(threshold, limit) for name, each in islands.items()}
            settings = {"threshold_db": threshold, "limit": float(f"{limit:.6g}")}
            if before is not None and {n: _names(f) for n, f in found.items()} == {
                n: _names(f) for n, f in before.items()
            }:
                continue
            before = found
            for name in self._fresh:
                self._write(name, islands[name], found[name], settings)
            figures = self._quality(exact)
            tries.append({**settings, "islands": {name: len(each) for name, each in found.items()}, **figures})
            if figures["psnr_db"] is not None and figures["psnr_db"] >= self._scan.budget_db:
                report = {
                    "precision": precision.name,
                    "rule": RULE,
                    "budget_db": self._scan.budget_db,
                    "scan": self._scan.record(self._bundle),
                    **settings,
                    **figures,
                    "tries": tries,
                }
                return {**self._done, **self._typed}, report
            if not self._fresh:
                break
        raise self._error(tries)

    def discard(self) -> None:
        """Remove what was written."""
        for typed in self._typed.values():
            for path in typed.files:
                remove(self._bundle.root / path)

    def _model(self, name: str) -> Path:
        return self._bundle.path(f"{name}/model.onnx")

    def _recording(self, ranges: Mapping[str, Ranges]) -> dict[str, Callable[[], Engine]]:
        """What loads each component in float32; those to be lowered gather their ranges."""

        def loader(name: str) -> Callable[[], Engine]:
            heard = self._calls[name].hear
            if name in ranges:
                return lambda: ranges[name].engine(heard)
            variant = self._bundle.component(name).variants[f"{FULL}/{STANDARD}"]
            return lambda: Recorded(load_variant(self._bundle.root, name, variant), heard)

        return {name: loader(name) for name in self._calls}

    def _islands(self, name: str, ranges: Mapping[str, float]) -> Islands:
        feeds = [feeds for feeds, _ in self._chosen(name)]
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if self._progress is not None:
                self._progress(f"losses of {name}", min(done, len(feeds)), len(feeds))

        found = Islands(self._model(name), name, self._precision, ranges, feeds, tick)
        gc.collect()
        return found

    def _chosen(self, name: str) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        return self._calls[name].chosen(len(self._scan.prompts))

    def _write(self, name: str, islands: Islands, found: list[Island], settings: Mapping[str, Any]) -> None:
        low = islands.types(found)
        written = write(self._model(name), name, self._precision, low)
        files = {path.relative_to(self._bundle.root).as_posix(): sha256_file(path) for path in written}
        report = {
            "precision": self._precision.name,
            "rule": RULE,
            **settings,
            "scan": self._scan.record(self._bundle),
            "islands": [_record(island) for island in found],
            "reasons": dict(sorted(Counter(island.reason for island in found).items())),
            "nodes": _counts(written[0], low),
            "lowest_loss_db": islands.lowest(found),
        }
        self._typed[name] = Typed(next(iter(files)), files, report)

    def _quality(self, exact: list[Array]) -> dict[str, Any]:
        """Images and outputs of the typed components against float32; `psnr_db` is None where they are not finite.

        It is the median: a loop may magnify any difference, however small, on some of its ways.
        """
        ratios: dict[str, dict[str, float]] = {}

        def loader(name: str, typed: Typed) -> Callable[[], Engine]:
            def load() -> Engine:
                path = self._bundle.path(typed.model)
                engine = start(emulated(path, self._precision), path.parent, name)
                if name not in ratios:
                    ratios[name] = compare(engine, self._chosen(name))
                return engine

            return load

        every = {**self._done, **self._typed}
        text = "quality"
        engines = {name: loader(name, typed) for name, typed in every.items()}
        figures: dict[str, Any] = {"psnr_db": None, "prompts": [], "components": ratios}
        try:
            images = draw(self._bundle, engines, self._scan, text, self._progress)
        except OverflowedError as error:
            return {**figures, "problem": str(error)}
        finally:
            gc.collect()
        found = [psnr(image, reference) for image, reference in zip(images, exact, strict=True)]
        figures["prompts"] = [
            {"prompt": prompt, "seed": self._scan.seed + i, "psnr_db": round(ratio, 2)}
            for i, (prompt, ratio) in enumerate(zip(self._scan.prompts, found, strict=True))
        ]
        broken = [name for name, each in ratios.items() if min(each.values()) <= -LOSSLESS]
        if broken:
            return {**figures, "problem": f"{', '.join(broken)} gives infinity or NaN where float32 does not"}
        return {**figures, "psnr_db": round(median(found), 2), "worst_db": round(min(found), 2)}

    def _error(self, tries: list[dict[str, Any]]) -> QualityError:
        last, name = tries[-1], self._precision.name
        other = "bf16" if name == "fp16" else "fp16"
        remedy = f"use --precision fp32 or {other}"
        budget = self._scan.budget_db
        if last["psnr_db"] is None:
            return QualityError(f"{name} is not finite: {last['problem']}; {remedy}")
        best = max(each["psnr_db"] or 0.0 for each in tries)
        worst = min(last["components"].items(), key=lambda item: min(item[1].values()))
        return QualityError(
            f"{name} images differ from fp32 by {best:.1f} dB PSNR, {budget:g} are asked, however much stays in "
            f"fp32 (tries: {len(tries)}): {worst[0]} loses most, {min(worst[1].values()):.1f} dB against fp32; "
            f"{remedy}, take what is left with a lower --min-psnr, or scan other prompts and more steps"
        )


def _names(islands: Iterable[Island]) -> set[str]:
    return {island.node for island in islands}


def _record(island: Island) -> dict[str, Any]:
    record: dict[str, Any] = {"node": island.node, "op": island.op, "reason": island.reason}
    if island.measured is not None:
        record["measured"] = island.measured
    return {**record, "of": island.of} if island.of else record


def _counts(path: Path, low: Mapping[str, bool]) -> dict[str, int]:
    """How many nodes make floats in each type, and how many casts lie between."""
    casts = sum(str(node.name).startswith(CAST) for node in read(path).graph)
    return {"low": sum(low.values()), "kept": len(low) - sum(low.values()), "casts": casts}
