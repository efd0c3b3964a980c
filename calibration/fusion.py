"""The stage that writes the graphs of an engine with operators of its own, and holds them against torch on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle import FULL, Bundle, Variant
from ..bundle.ledger import Kind, Ledger
from ..bundle.manifest import Files
from ..bundle.reports import with_report
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

_REVISION = 3
"""Raise it when the same models would give other graphs."""


@dataclass(frozen=True, slots=True)
class Fused:
    """The graphs of the components of a bundle in one precision, and what was counted and measured of each."""

    variants: dict[str, Variant]
    report: dict[str, Any]

    def __post_init__(self) -> None:
        if not all({each.model, each.per_prompt} <= {"", *each.files} for each in self.variants.values()):
            raise ValueError("a component has no graph")

    def all_files(self) -> Files:
        """The files of all components."""
        return {path: sha for each in self.variants.values() for path, sha in each.files.items()}


FUSED = Kind(Fused, Fused.all_files)


def fuse(bundle: Bundle, ledger: Ledger, engine: EngineName, precision: str, meter: Meter) -> Bundle:
    """`bundle`, which lies in the ledger's working folder, with the graphs of `engine` in `precision`.

    Raises `EngineError` when a graph does not give what torch gave.
    """
    parts = bundle.manifest.components
    found = {name: part.variant(precision) for name, part in parts.items() if part.role != "step"}
    models = {name: variant for name, variant in found.items() if variant is not None}
    per_prompt = {bundle.manifest.named("denoiser"): bundle.manifest.wiring.per_prompt()}
    decided = {"revision": _REVISION, "models": {name: asdict(each) for name, each in models.items()}}
    key = sha256_json({**decided, "per_prompt": per_prompt, "precision": precision})

    def make() -> Fused:
        variants, report = {}, {}
        for name, model in models.items():
            meter.show(f"{engine} {precision}, {name}")
            variants[name], report[name] = _fused(bundle, name, model, precision, per_prompt.get(name, ()))
        return Fused(variants, report)

    made = ledger.once(record_name(engine, precision), key, FUSED, make)
    meter.step()
    components = {
        name: replace(part, variants=part.variants | {f"{precision}/{engine}": made.variants[name]})
        if name in made.variants
        else part
        for name, part in parts.items()
    }
    bundle = replace(bundle, manifest=replace(bundle.manifest, components=components))
    return with_report(bundle, "fusion", {f"{precision}/{engine}": made.report})


def record_name(engine: EngineName, precision: str) -> str:
    """Of the stage's record."""
    return f"fusion.{engine.provider}.{precision}"


def _fused(
    bundle: Bundle, name: str, model: Variant, precision: str, per_prompt: tuple[str, ...]
) -> tuple[Variant, dict[str, Any]]:
    """The graph of one component, and the report on it."""
    source = bundle.path(model.model)
    whole, once = fuse_for_cuda(source, per_prompt)
    files = {path.relative_to(bundle.root).as_posix(): sha256_file(path) for path in (*whole, *once)}
    paths = [path.relative_to(bundle.root).as_posix() for path in (*whole[:1], *once[:1])]
    variant = Variant(paths[0], files, *paths[1:])
    feeds, expected = recorded_case(bundle, name)
    check = compare_outputs(name, precision, _engine(name, precision, whole[0], *once[:1])(feeds), expected)
    if not check.passed:
        raise EngineError(
            f"{name}: its graph for CUDA gives {check.max_abs_error:.1e} more or less than torch, "
            f"{check.allowed:.1e} is allowed: use --engine onnxruntime, and please report it"
        )
    report = {
        "operators": {"before": _operators(source), "after": _operators(*whole[:1], *once[:1])},
        "max_abs_error": check.max_abs_error,
        "allowed": check.allowed,
    }
    return variant, report


def _engine(name: str, precision: str, graph: Path, once: Path | None = None) -> Engine:
    """The graphs as the GPU would run them, on the CPU: operators written out, values rounded where they are stored."""
    model = open_model(graph)
    in_standard_operators(model)
    if precision != FULL:
        model = emulated(model, precision_of(precision))
    engine = start(model, graph.parent, name, fast=False)
    return (
        engine if once is None else SplitEngine(name, start(open_model(once), graph.parent, name, fast=False), engine)
    )


def _operators(*graphs: Path) -> Mapping[str, int]:
    return dict(sorted(Counter(node.op_type for path in graphs for node in open_model(path).graph).items()))
