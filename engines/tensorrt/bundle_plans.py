"""The TensorRT plans of a bundle: one for each component and profile, built where the store has none."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...bundle import EIGHT_BIT, FULL, Bundle, Manifest
from ...bundle.reports import is_report, read_report, with_report
from ...common.errors import EngineError
from ...common.files import read_json
from ...common.machine import trim_memory
from ...common.progress import Meter
from ..cache import RECORD_NAME, EngineStore
from ..gpu.device import Device
from .backend import BACKENDS, ELSEWHERE, Backend
from .build import build, find
from .plan import Recipe
from .target import Target, profiles
from .variants import BESIDE, model_of

_AT_THE_GPU = ("refit", "strip")
_CLASSIC_ONLY = ("version-compatible", "hardware-compatible")
_NO_BF16 = ("sm75",)
_NO_FP8 = ("sm75", "sm80", "sm86", "sm87")
TIMING_NAME = "timing.cache"


@dataclass(frozen=True, slots=True)
class BuildMachine:
    """What plans are built with and for: the version of the module, and the GPU, "" when that is elsewhere."""

    backend: str
    version: str
    archs: tuple[str, ...]
    device: str


def resolve_machine(backend: str, precision: str, target: Target) -> BuildMachine:
    """Hold `target` against the backend that is installed and the GPU that is here, before any work is done.

    Raises `EngineError` for an architecture that it does not know, a flag that it cannot build with, or when it needs
    a GPU and there is none.
    """
    chosen = BACKENDS[backend]
    version = str(chosen.load().__version__)
    if chosen.ahead_of_time:
        _check_ahead_of_time(chosen, target)
    elif target.archs:
        raise EngineError(f"{backend} builds for the GPU of this machine: leave --arch out, or use tensorrt-rtx")
    if target.archs:
        archs = tuple(arch for arch in chosen.architectures() if arch in target.archs)
        machine = BuildMachine(backend, version, archs, "")
    else:
        gpu = _gpu_here(chosen, target)
        machine = BuildMachine(backend, version, (gpu.arch,), gpu.name)
    without = [arch for arch in machine.archs if arch in _NO_FP8]
    if precision == "fp8" and without:
        raise EngineError(f"{without[0]} has no 8-bit floats: use --precision int8, or build for sm89 and newer")
    old = [arch for arch in machine.archs if arch in _NO_BF16]
    if precision == "bf16" and old:
        raise EngineError(f"{old[0]} has no bfloat16: use --precision fp16, or build for newer architectures")
    return machine


def _check_ahead_of_time(backend: Backend, target: Target) -> None:
    """Raise `EngineError` for what a backend that builds for GPUs elsewhere cannot build."""
    known = backend.architectures()
    unknown = [arch for arch in target.archs if arch not in known]
    if unknown:
        raise EngineError(
            f"{backend.name} does not know the architecture {unknown[0]!r}: choose from {', '.join(known)}; "
            f"other GPUs, such as Hopper's (sm90), take --engine {ELSEWHERE}"
        )
    wrong = [flag for flag in _CLASSIC_ONLY if flag in target.flags]
    if wrong:
        raise EngineError(f"{backend.name} builds no {wrong[0]} plans, --engine tensorrt does: leave the flag out")
    if target.archs and _needs_gpu(target):
        raise EngineError(f"{_needs_gpu(target)}, for that GPU: leave --arch out there")


def _needs_gpu(target: Target) -> str:
    """Why the plans cannot be built elsewhere, "" when they can."""
    flags = [flag for flag in _AT_THE_GPU if flag in target.flags]
    return f"{' and '.join(flags)} plans are built on the machine that has the GPU" if flags else ""


def _gpu_here(backend: Backend, target: Target) -> Device:
    """The GPU of this machine. Raises `EngineError` when there is none, or plans of `backend` do not run on it."""
    try:
        gpu = Device()
    except EngineError as error:
        names = ",".join(backend.architectures())
        remedy = _needs_gpu(target) or (f"name the GPUs to build for, of --arch {names}" if names else "")
        if not remedy:
            raise
        raise EngineError(f"{str(error).partition(':')[0]}: {remedy}") from None
    backend.check_gpu(gpu.name, gpu.arch)
    return gpu


def build_plans(bundle: Bundle, machine: BuildMachine, precision: str, target: Target, meter: Meter) -> Bundle:
    """`bundle` with all plans asked for in its store, built where they are missing, and the report on them.

    precision: of all components that have it; the others are built in fp32.
    Raises `EngineError` when a model is missing or its plan cannot be built.
    """
    store = EngineStore(bundle.root / "engines")
    found = read_report(bundle, "precision")
    reports = {each: found.get(each, {}) for each in (FULL, BESIDE, precision)}
    described = []
    gc.collect()
    trim_memory()
    for recipe, model in _recipes(bundle, machine, precision, target):
        plan = find(store, recipe)
        if plan is None:
            what = f"plan of {recipe.component}, {recipe.profile.name}"
            meter.show(what)
            plan = build(
                store,
                recipe,
                model,
                fp32_nodes=_not_low(model, recipe.precision, reports[recipe.precision].get(recipe.component)),
                timing=store.root / TIMING_NAME,
                memory_limit=target.memory_limit,
                progress=lambda phase, part, what=what: meter.show(what, part),  # type: ignore[misc]
            )
        meter.step()
        described.append(read_json(plan.folder / RECORD_NAME, "the record of a plan"))
    return with_report(bundle, "plans", {"warnings": warnings_of(described), "plans": described})


def count_plans(manifest: Manifest, target: Target) -> int:
    """How many plans `build_plans` makes."""
    return sum(len(profiles(manifest, name, target)) for name in manifest.components)


def _recipes(bundle: Bundle, machine: BuildMachine, precision: str, target: Target) -> Iterator[tuple[Recipe, Path]]:
    """The recipe of each plan, and the model that it is built from."""
    for name, component in bundle.manifest.components.items():
        own, variant = model_of(component, precision)
        if variant is None:
            raise EngineError(f"{name} has no model in {own}: compile the bundle again")
        for profile in profiles(bundle.manifest, name, target):
            recipe = Recipe(
                component=name,
                source=variant.files,
                precision=own,
                profile=profile,
                flags=target.flags if component.role != "step" else (),
                **asdict(machine),
            )
            yield recipe, bundle.path(variant.model)


def _not_low(model: Path, precision: str, report: Any) -> frozenset[str]:
    """The names of the ONNX nodes of `model` that are not in `precision` on purpose.

    In 16 bits the report on the precision says which; in 8 bits those that read no rounded value.
    """
    if precision in EIGHT_BIT:
        import onnx

        graph = onnx.load(model, load_external_data=False).graph
        rounded = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        return frozenset(node.name for node in graph.node if node.name and rounded.isdisjoint(node.input))
    if not is_report(report) or not report["islands"]:
        return frozenset()
    import onnx

    outputs = {island["node"] for island in report["islands"]}
    graph = onnx.load(model, load_external_data=False).graph
    return frozenset(node.name for node in graph.node if outputs.intersection(node.output))


def warnings_of(described: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not as asked for in these plans, a line each."""
    lines = []
    for record in described:
        missed = record["made_of"]["not_in_precision"]
        if missed:
            shown = ", ".join(missed[:5]) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
            lines.append(
                f"{record['component']}, {record['profile']['name']}: {len(missed)} layers are not in "
                f"{record['precision']}: {shown}"
            )
    return lines
