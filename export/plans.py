"""The TensorRT plans of a bundle: one for each component and profile, built where the store has none."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import FULL, Manifest
from ..common.errors import EngineError
from ..common.files import read_json
from ..common.machine import trim_memory
from ..engines import EngineStore
from ..engines.cache import RECORD_NAME
from ..engines.tensorrt.backend import BACKENDS, ELSEWHERE
from ..engines.tensorrt.build import build, find
from ..engines.tensorrt.recipe import Recipe
from .target import Target, profiles

_AT_THE_GPU = ("refit", "strip")
_CLASSIC_ONLY = ("version-compatible", "hardware-compatible")
_NO_BF16 = ("sm75",)
TIMING_NAME = "timing.cache"


@dataclass(frozen=True, slots=True)
class Site:
    """What plans are built with and for: the version of the module, and the GPU, "" when that is elsewhere."""

    backend: str
    version: str
    archs: tuple[str, ...]
    device: str


def site(backend: str, precision: str, target: Target) -> Site:
    """Hold `target` against the backend that is installed and the GPU that is here, before any work is done.

    Raises `EngineError` for an architecture that it does not know, a flag that it cannot build with, or when it needs
    a GPU and there is none.
    """
    module = BACKENDS[backend].load()
    flags = set(target.flags)
    if BACKENDS[backend].ahead_of_time:
        known = BACKENDS[backend].architectures()
        unknown = [arch for arch in target.archs if arch not in known]
        if unknown:
            raise EngineError(
                f"{backend} does not know the architecture {unknown[0]!r}: choose from {', '.join(known)}; "
                f"other GPUs, such as Hopper's (sm90), take --engine {ELSEWHERE}"
            )
        wrong = [flag for flag in _CLASSIC_ONLY if flag in flags]
        if wrong:
            raise EngineError(f"{backend} builds no {wrong[0]} plans, --engine tensorrt does: leave the flag out")
        if flags & set(_AT_THE_GPU) and target.archs:
            raise EngineError(
                f"{' and '.join(sorted(flags & set(_AT_THE_GPU)))} plans are built on the machine that has the GPU, "
                "for that GPU: leave --arch out there"
            )
        if target.archs:
            _check_types(precision, target.archs)
            return Site(backend, str(module.__version__), tuple(arch for arch in known if arch in target.archs), "")
    elif target.archs:
        raise EngineError(f"{backend} builds for the GPU of this machine: leave --arch out, or use tensorrt-rtx")
    from ..engines.tensorrt.cuda import Device

    try:
        gpu = Device()
    except EngineError as error:
        at_the_gpu = [flag for flag in _AT_THE_GPU if flag in flags]
        if at_the_gpu:
            reason = f"{' and '.join(at_the_gpu)} plans are built on the machine that has the GPU"
            raise EngineError(f"{str(error).partition(':')[0]}: {reason}") from None
        if not BACKENDS[backend].ahead_of_time:
            raise
        names = ",".join(BACKENDS[backend].architectures())
        raise EngineError(f"{str(error).partition(':')[0]}: name the GPUs to build for, of --arch {names}") from None
    BACKENDS[backend].check_gpu(gpu.name, gpu.arch)
    _check_types(precision, (gpu.arch,))
    return Site(backend, str(module.__version__), (gpu.arch,), gpu.name)


def _check_types(precision: str, archs: tuple[str, ...]) -> None:
    old = [arch for arch in archs if arch in _NO_BF16]
    if precision == "bf16" and old:
        raise EngineError(f"{old[0]} has no bfloat16: use --precision fp16, or build for newer architectures")


def build_plans(
    root: Path,
    manifest: Manifest,
    store: EngineStore,
    place: Site,
    precision: str,
    target: Target,
    kept: Mapping[str, Collection[str]],
    progress: Callable[[str, int, float], None],
) -> list[dict[str, Any]]:
    """Build what is missing and describe all plans asked for. root: the bundle's folder.

    kept: ONNX nodes of each component that are in fp32 on purpose. progress: `progress(what, plans done, part of this
    one)`.
    """
    recipes = []
    for name, component in manifest.components.items():
        typed = component.variant(precision)
        own, variant = (FULL, component.variant(FULL)) if typed is None else (precision, typed)
        if variant is None:
            raise EngineError(f"{name} has no model in {own}: compile the bundle again")
        for profile in profiles(manifest, name, target):
            recipe = Recipe(
                component=name,
                source=variant.files,
                backend=place.backend,
                version=place.version,
                archs=place.archs,
                device=place.device,
                precision=own,
                profile=profile,
                flags=target.flags if component.role != "step" else (),
            )
            recipes.append((recipe, root / variant.model))
    gc.collect()
    trim_memory()
    described = []
    for i, (recipe, model) in enumerate(recipes):
        what = f"plan of {recipe.component}, {recipe.profile.name}"
        plan = find(store, recipe)
        if plan is None:
            progress(what, i, 0.0)
            plan = build(
                store,
                recipe,
                model,
                kept=kept.get(recipe.component, ()),
                timing=store.root / TIMING_NAME,
                memory_limit=target.memory_limit,
                progress=lambda phase, part, what=what, i=i: progress(what, i, part),  # type: ignore[misc]
            )
        described.append(read_json(plan.folder / RECORD_NAME, "the record of a plan"))
    return described


def count_plans(manifest: Manifest, target: Target) -> int:
    """How many plans `build_plans` makes."""
    return sum(len(profiles(manifest, name, target)) for name in manifest.components)


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
