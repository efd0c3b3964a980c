"""A built plan in the engine store: what it was built from and for, and the choice among several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...bundle import EngineError, Variant
from ...bundle.files import sha256_file
from ..cache import EngineStore
from ..profiles import Profile, Shape

PLAN_NAME = "plan"
CACHE_NAME = "runtime.cache"
"""What TensorRT for RTX compiled for this GPU, beside the plan; not hashed, for it grows."""

_OLDEST_COMPATIBLE = 80
"""Hardware-compatible plans run on this compute capability (times ten) and newer ones."""


class GpuName(Protocol):
    """A GPU as plans name it."""

    @property
    def name(self) -> str: ...

    @property
    def arch(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan. archs: GPU architectures as `sm89`. device: the GPU it was built on, "" when built ahead of time.

    flags: of `refit`, `strip`, `weight-streaming`, `version-compatible`, `hardware-compatible`.
    source: path in the bundle → SHA-256 of the ONNX files that it was built from. files: name → SHA-256 of its own.
    """

    folder: Path
    key: str
    component: str
    backend: str
    version: str
    archs: tuple[str, ...]
    device: str
    precision: str
    profile: Profile
    flags: tuple[str, ...]
    source: dict[str, str]
    files: dict[str, str]

    @classmethod
    def from_record(cls, root: Path, record: Mapping[str, Any]) -> Plan:
        """The plan of an engine record in the store at `root`. Raises `EngineError` when the record is damaged."""
        try:
            return cls(
                folder=root / record["key"],
                key=record["key"],
                component=record["component"],
                backend=record["backend"],
                version=record["version"],
                archs=tuple(record["archs"]),
                device=record["device"],
                precision=record["precision"],
                profile=Profile.from_json(record["profile"]),
                flags=tuple(record["flags"]),
                source=dict(record["source"]),
                files=dict(record["files"]),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"the record of a plan is damaged ({error}): compile the bundle again") from None

    @property
    def path(self) -> Path:
        """The serialized engine."""
        return self.folder / PLAN_NAME

    def check(self) -> None:
        """Raise `EngineError` when the plan's file is missing or was changed since it was built."""
        try:
            whole = sha256_file(self.path) == self.files.get(PLAN_NAME)
        except OSError:
            whole = False
        if not whole:
            raise EngineError(
                f"{self.component}: the plan {self.path} is missing or was changed after it was built: "
                "compile the bundle again"
            )


def usable(
    store: EngineStore, component: str, variant: Variant, precision: str, backend: str, version: str, gpu: GpuName
) -> list[Plan]:
    """The plans in `store` that this backend and GPU can run and that were built from this very model.

    Raises `EngineError` saying why there is none.
    """
    again = f"compile the bundle again with --engine {backend}"
    plans = [
        Plan.from_record(store.root, record)
        for record in store.records()
        if record.get("component") == component and record.get("backend") == backend
    ]
    if not plans:
        raise EngineError(f"{component}: the bundle holds no {backend} plan: {again}")
    conditions: list[tuple[Callable[[Plan], bool], Callable[[Plan], str]]] = [
        (lambda plan: plan.source == variant.files, lambda plan: "of another model than the bundle's"),
        (lambda plan: plan.precision == precision, lambda plan: f"in {plan.precision}, {precision} is asked"),
        (
            lambda plan: _same_version(plan, version),
            lambda plan: f"of {backend} {plan.version}, installed is {version}",
        ),
        (
            lambda plan: _same_gpu(plan, gpu),
            lambda plan: f"for {plan.device or ', '.join(plan.archs)}, this GPU is {gpu.name} ({gpu.arch})",
        ),
    ]
    for holds, reason in conditions:
        left = [plan for plan in plans if holds(plan)]
        if not left:
            why = "; ".join(dict.fromkeys(reason(plan) for plan in plans))
            raise EngineError(f"{component}: its plans are {why}: {again} --precision {precision}")
        plans = left
    return plans


def _same_version(plan: Plan, version: str) -> bool:
    if "version-compatible" in plan.flags:
        return plan.version.split(".")[0] == version.split(".")[0]
    return plan.version == version


def _same_gpu(plan: Plan, gpu: GpuName) -> bool:
    if "hardware-compatible" in plan.flags:
        return int(gpu.arch[2:]) >= _OLDEST_COMPATIBLE
    return gpu.arch in plan.archs and plan.device in ("", gpu.name)


def closest(component: str, plans: Sequence[Plan], shapes: Mapping[str, Shape]) -> Plan:
    """The plan whose profile takes inputs of these shapes and lies closest, a static one first.

    Raises `EngineError` saying what was asked and what the plans take.
    """
    fitting = [plan for plan in plans if plan.profile.takes(shapes)]
    if not fitting:
        asked = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
        built = "; ".join(sorted({plan.profile.name for plan in plans}))
        raise EngineError(
            f"{component}: no plan takes {asked}; built are: {built}. Compile with a --shape and --batch that hold it"
        )
    return min(fitting, key=lambda plan: (not plan.profile.static, plan.profile.distance(shapes), plan.key))
