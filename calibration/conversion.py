"""`convert_models`: a bundle's components in a lower precision, held against float32."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..bundle import FULL, Bundle
from ..common.arrays import Array
from ..common.errors import OverflowedError
from ..common.files import remove, sha256_file
from ..common.progress import Progress
from ..engines import Engine
from .fp32_nodes import Fp32Node, Fp32Nodes
from .graph import CAST, read
from .losses import LOSSLESS
from .precision import MARGIN, Precision, precision_of
from .quality import QualityError, compare
from .ranges import Ranges
from .rewrite import ConvertedModel, write
from .scan import Scan, run_loop
from .sessions import Recorder, emulated_engine

RULE = 2
"""Raise it when the same measurements would give other types."""
_TRIES = 4
_TIGHTER_DB = 5.0
_MOST_CALLS = 256


def convert_models(
    bundle: Bundle,
    precision: str,
    *,
    scan: Scan | None = None,
    progress: Progress = lambda text, done, total: None,
) -> tuple[dict[str, ConvertedModel], dict[str, Any]]:
    """All components of the float32 `bundle` but `step` in a lower precision, and the quality report.

    precision: `fp16` or `bf16`. scan: what the loop is run with. progress: called as `progress(text, done, total)`.
    The report holds the PSNR of each image in dB, the signal-to-noise ratio of each output in dB, and the tries.
    Raises `QualityError` when the median image is under the scan's budget or one is not finite, whatever stays in
    float32; `DiffoundryError` for an unknown precision, a model that cannot be calibrated or a full disk. It leaves no
    file of its own then.
    """
    work = _Conversion(bundle, precision_of(precision), scan or Scan(), progress)
    try:
        return work.run()
    except BaseException:
        work.discard()
        raise


class _Conversion:
    def __init__(self, bundle: Bundle, precision: Precision, scan: Scan, progress: Progress) -> None:
        self._bundle, self._precision, self._scan, self._progress = bundle, precision, scan, progress
        names = [name for name, part in bundle.manifest.components.items() if part.role != "step"]
        self._calls = {name: Recorder(_MOST_CALLS) for name in names}
        self._converted: dict[str, ConvertedModel] = {}

    def run(self) -> tuple[dict[str, ConvertedModel], dict[str, Any]]:
        exact, measured = self._measured()
        tries: list[dict[str, Any]] = []
        before: list[set[str]] = []
        for i in range(_TRIES):
            threshold, limit = self._precision.threshold + i * _TIGHTER_DB, self._precision.limit / MARGIN**i
            found = {name: each.find(threshold, limit) for name, each in measured.items()}
            nodes = [{each.node for each in kept} for kept in found.values()]
            if nodes == before:
                continue
            before = nodes
            settings = {"threshold_db": threshold, "limit": float(f"{limit:.6g}")}
            for name, kept in found.items():
                self._write(name, measured[name], kept, settings)
            figures = self._quality(exact)
            tries.append({**settings, "islands": {name: len(kept) for name, kept in found.items()}, **figures})
            if self._scan.is_within(figures, self._precision.name):
                head = {
                    "precision": self._precision.name,
                    "rule": RULE,
                    **self._scan.asked(self._precision.name),
                }
                report = {**head, "scan": self._scan.record(self._bundle), **settings, **figures, "tries": tries}
                return self._converted, report
        raise self._error(tries)

    def _measured(self) -> tuple[list[Array], dict[str, Fp32Nodes]]:
        """The images in float32, and what was measured of each component while they were made."""
        ranges = {name: Ranges(self._model(name), name) for name in self._calls}
        engines = {name: partial(each.engine, self._calls[name].add) for name, each in ranges.items()}
        exact = run_loop(self._bundle, engines, self._scan, "ranges", self._progress, controlled=True)
        self._scan.figures(exact, exact, self._precision.name)  # a user's function fails now, or never
        return exact, {name: self._fp32_nodes(name, each.largest()) for name, each in ranges.items()}

    def discard(self) -> None:
        """Remove what was written."""
        for name, model in self._converted.items():
            exact = self._bundle.component(name).variant(FULL)
            for path in model.files.keys() - (exact.files.keys() if exact else ()):
                remove(self._bundle.root / path)

    def _model(self, name: str) -> Path:
        return self._bundle.path(f"{name}/model.onnx")

    def _fp32_nodes(self, name: str, ranges: Mapping[str, float]) -> Fp32Nodes:
        feeds = [feeds for feeds, _ in self._sample(name)]
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self._progress(f"losses of {name}", min(done, len(feeds)), len(feeds))

        found = Fp32Nodes(self._model(name), name, self._precision, ranges, feeds, tick)
        gc.collect()
        return found

    def _sample(self, name: str) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        return self._calls[name].sample(len(self._scan.prompts))

    def _write(self, name: str, measured: Fp32Nodes, found: list[Fp32Node], settings: Mapping[str, Any]) -> None:
        low = measured.types(found)
        written = write(self._model(name), name, self._precision, low)
        casts = sum(str(node.name).startswith(CAST) for node in read(written[0]).graph)
        files = {path.relative_to(self._bundle.root).as_posix(): sha256_file(path) for path in written}
        report = {
            "precision": self._precision.name,
            "rule": RULE,
            **settings,
            "scan": self._scan.record(self._bundle),
            "islands": [{k: v for k, v in asdict(node).items() if v not in (None, "")} for node in found],
            "reasons": dict(sorted(Counter(node.reason for node in found).items())),
            "nodes": {"low": sum(low.values()), "kept": len(low) - sum(low.values()), "casts": casts},
            "lowest_loss_db": measured.lowest(found),
        }
        self._converted[name] = ConvertedModel(next(iter(files)), files, report)

    def _quality(self, exact: list[Array]) -> dict[str, Any]:
        """Images and outputs of the converted components against float32; `psnr_db` is None: they are not finite."""
        ratios: dict[str, dict[str, float]] = {}

        def load(name: str, model: str) -> Engine:
            engine = emulated_engine(self._bundle.path(model), name, self._precision)
            if name not in ratios:
                ratios[name] = compare(engine, self._sample(name))
            return engine

        engines = {name: partial(load, name, model.model) for name, model in self._converted.items()}
        figures: dict[str, Any] = {"psnr_db": None, "prompts": [], "components": ratios}
        try:
            images = run_loop(self._bundle, engines, self._scan, "quality", self._progress, controlled=True)
        except OverflowedError as error:
            return {**figures, "problem": str(error)}
        finally:
            gc.collect()
        broken = [name for name, each in ratios.items() if min(each.values()) <= -LOSSLESS]
        if broken:
            return {**figures, "problem": f"{', '.join(broken)} gives infinity or NaN where float32 does not"}
        return figures | self._scan.figures(images, exact, self._precision.name)

    def _error(self, tries: list[dict[str, Any]]) -> QualityError:
        last, name = tries[-1], self._precision.name
        other = "bf16" if name == "fp16" else "fp16"
        remedy = f"use --precision fp32 or {other}"
        if last["psnr_db"] is None:
            return QualityError(f"{name} is not finite: {last['problem']}; {remedy}")
        reached, option = self._scan.missed(tries, name)
        worst = min(last["components"].items(), key=lambda item: min(item[1].values()))
        return QualityError(
            f"{name} images {reached}, {self._scan.budget_of(name).least:g} are asked, however much stays in "
            f"fp32 (tries: {len(tries)}): {worst[0]} loses most, {min(worst[1].values()):.1f} dB against fp32; "
            f"{remedy}, take what is left with a lower {option}, or scan other prompts and more steps"
        )
