"""The stage that writes the graphs of an engine with operators of its own, and holds them against torch on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..bundle import FULL, Bundle, Variant
from ..bundle.ledger import Kind, Ledger
from ..bundle.manifest import Files
from ..bundle.reports import is_fusion, read_report, with_report
from ..common.errors import EngineError
from ..common.files import sha256_file, sha256_json
from ..common.progress import Meter
from ..engines import Engine
from ..engines.fusion.cuda import fuse_for_cuda
from ..engines.fusion.graph import open_model
from ..engines.fusion.standard import in_standard_operators
from ..engines.names import EngineName
from ..engines.split import SplitEngine
from ..engines.verify import compare_outputs, recorded_case
from .precision import precision_of
from .rewrite import emulated
from .sessions import start

_REVISION = 4
"""Raise it when the same models would give other graphs."""
_REPORT = "fusion"


@dataclass(frozen=True, slots=True)
class Fused:
    """The graphs of a component in one precision, and what was counted and measured of them."""

    variant: Variant
    report: dict[str, Any]

    def __post_init__(self) -> None:
        if not {self.variant.model, self.variant.per_prompt} <= {"", *self.variant.files} or not is_fusion(self.report):
            raise ValueError("it has no graph, or was not measured")

    def all_files(self) -> Files:
        """The files of its graphs."""
        return self.variant.files


FUSED = Kind(Fused, Fused.all_files)


def fuse(bundle: Bundle, ledger: Ledger, engine: EngineName, precision: str, meter: Meter) -> Bundle:
    """`bundle`, which lies in the ledger's working folder, with the graphs of `engine` in `precision`.

    Raises `EngineError` when a graph does not give what torch gave.
    """
    components = dict(bundle.manifest.components)
    report = {}
    for name, part in components.items():
        model = part.variant(precision) if part.role != "step" else None
        if model is None:
            continue
        meter.show(f"{engine} {precision}, {name}")
        per_prompt = bundle.manifest.per_prompt(name)
        key = sha256_json({"revision": _REVISION, "model": asdict(model), "per_prompt": per_prompt})
        make = partial(_fused, bundle, name, model, precision, per_prompt)
        made = ledger.once(record_name(engine, precision, name), key, FUSED, make)
        components[name] = replace(part, variants=part.variants | {f"{precision}/{engine}": made.variant})
        report[name] = made.report
    meter.step()
    bundle = replace(bundle, manifest=replace(bundle.manifest, components=components))
    return with_report(bundle, _REPORT, {f"{precision}/{engine}": report})


def forget_removed(bundle: Bundle) -> Bundle:
    """`bundle` without the reports on graphs that it has not any more."""
    report = read_report(bundle, _REPORT)
    there = {name for part in bundle.manifest.components.values() for name in part.variants}
    gone = dict.fromkeys(report.keys() - there)
    return with_report(bundle, _REPORT, gone) if gone else bundle


def record_name(engine: EngineName, precision: str, component: str) -> str:
    """Of the stage's record."""
    return f"fusion.{engine.provider}.{precision}.{component}"


def _fused(bundle: Bundle, name: str, model: Variant, precision: str, per_prompt: tuple[str, ...]) -> Fused:
    source = bundle.path(model.model)
    whole, once = fuse_for_cuda(source, per_prompt)
    files = {path.relative_to(bundle.root).as_posix(): sha256_file(path) for path in (*whole, *once)}
    paths = [path.relative_to(bundle.root).as_posix() for path in (*whole[:1], *once[:1])]
    feeds, expected = recorded_case(bundle, name)
    check = compare_outputs(name, precision, _engine(name, precision, whole[0], *once[:1])(feeds), expected)
    if not check.passed:
        plain = compare_outputs(name, precision, _engine(name, precision, source)(feeds), expected)
        off = f"{check.max_abs_error:.1e} from torch, {check.allowed:.1e} is allowed"
        if plain.passed:
            raise EngineError(f"{name}: its graph for CUDA is off by {off}: use --engine onnxruntime, and report it")
        raise EngineError(
            f"{name}: in {precision} it is off by {off}, and its plain graph by {plain.max_abs_error:.1e}: build the "
            "precision again with more --scan-steps and --scan-prompts, or use --precision fp32"
        )
    operators = {"before": _operators(source), "after": _operators(*whole[:1], *once[:1])}
    report = {"operators": operators, "max_abs_error": check.max_abs_error, "allowed": check.allowed}
    return Fused(Variant(paths[0], files, *paths[1:]), report)


def _engine(name: str, precision: str, graph: Path, once: Path | None = None) -> Engine:
    """The graphs as the GPU would run them, on the CPU: operators written out, values rounded where they are stored."""

    def load(path: Path, rounds: bool) -> Engine:
        model = open_model(path)
        in_standard_operators(model)
        if rounds:
            model = emulated(model, precision_of(precision))
        return start(model, path.parent, name, fast=False)

    engine = load(graph, rounds=precision != FULL)
    return engine if once is None else SplitEngine(name, load(once, rounds=False), engine)


def _operators(*graphs: Path) -> Mapping[str, int]:
    return dict(sorted(Counter(node.op_type for path in graphs for node in open_model(path).graph).items()))
