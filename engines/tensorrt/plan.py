"""A built plan in the engine store: what it was built from and for, and the choice among several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from ...bundle import Variant
from ...common.checks import is_number
from ...common.errors import EngineError
from ...common.files import sha256_file
from ..cache import EngineStore
from ..profiles import Shape
from .recipe import Recipe

PLAN_NAME = "plan"
CACHE_NAME = "runtime.cache"
"""What TensorRT for RTX compiled for this GPU, beside the plan; not hashed, for it grows."""

_LARGEST_FIGURE = 1e15
"""No plan has as many bytes, seconds or layers."""
_OLDEST_COMPATIBLE = 80
"""Hardware-compatible plans run on this compute capability (times ten) and newer ones."""


def is_measured(record: Mapping[str, Any]) -> bool:
    """Whether the record tells what was measured when the plan was built, each figure of its kind."""
    made, memory = record.get("made_of"), record.get("memory")
    if not isinstance(made, dict) or not isinstance(memory, dict):
        return False
    attention = made.get("attention")
    counts = [made.get("layers"), made.get("heavy"), attention, memory]
    return (
        all(isinstance(part, dict) and all(map(_is_figure, part.values())) for part in counts)
        and isinstance(attention, dict)
        and {"fused", "of"} <= set(attention)
        and _is_figure(record.get("seconds"))
        and _is_figure(record.get("peak_bytes"))
        and all(
            isinstance(words, list) and all(isinstance(word, str) for word in words)
            for words in (record.get("warnings"), made.get("not_in_precision"))
        )
    )


def _is_figure(value: Any) -> bool:
    return is_number(value) and 0 <= value < _LARGEST_FIGURE


class GpuName(Protocol):
    """A GPU as plans name it."""

    @property
    def name(self) -> str: ...

    @property
    def arch(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Plan(Recipe):
    """A plan that was built of its recipe. folder: of the store. files: name → SHA-256 of its own files."""

    folder: Path = Path()
    key: str = ""
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, store: EngineStore, record: Mapping[str, Any]) -> Plan:
        """The plan of an engine record. Raises `EngineError` when the record is damaged or not that of its key."""
        recipe = Recipe.from_record(store, record)
        files = record.get("files")
        if not isinstance(files, dict) or PLAN_NAME not in files or not is_measured(record):
            raise EngineError(f"the record of the plan {record['key']} is damaged: compile the bundle again")
        own = {item.name: getattr(recipe, item.name) for item in fields(recipe)}
        return cls(**own, folder=store.root / record["key"], key=record["key"], files=files)

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
    records = [
        record
        for record in store.records()
        if record.get("component") == component and record.get("backend") == backend
    ]
    if not records:
        raise EngineError(f"{component}: the bundle holds no {backend} plan: {again}")
    plans, damage = [], ""
    for record in records:
        try:
            plans.append(Plan.read(store, record))
        except EngineError as error:
            damage = str(error)
    if not plans:
        raise EngineError(f"{component}: {damage}")
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
