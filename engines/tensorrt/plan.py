"""A built plan in the engine store: what it was built from and for, and the choice among several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import le
from pathlib import Path
from typing import Annotated, Any

from ...bundle import Variant
from ...bundle.manifest import Files
from ...bundle.reader import Rule, fits, read
from ...common.errors import EngineError
from ...common.files import holds
from ..cache import EngineStore
from ..gpu.device import Device

FLAGS = ("refit", "strip", "weight-streaming", "version-compatible", "hardware-compatible")
_REVISION = 1
"""Raise it when the same inputs are built in another way."""
PLAN_NAME = "plan"
CACHE_NAME = "runtime.cache"
"""What TensorRT for RTX compiled for this GPU, beside the plan; not hashed, for it grows."""

_LARGEST_FIGURE = 1e15
"""No plan has as many bytes, seconds or layers."""
_OLDEST_COMPATIBLE = 80
"""Hardware-compatible plans run on this compute capability (times ten) and newer ones."""

_LARGEST_AXIS = 1 << 31
Shape = tuple[Annotated[int, Rule(lambda size: 1 <= size < _LARGEST_AXIS, f"be from 1 to {_LARGEST_AXIS - 1}")], ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """For each input of a component the least, usual and largest shape. `name` says it to people."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def __post_init__(self) -> None:
        for name, (least, usual, largest) in self.shapes.items():
            if not all(a <= b <= c for a, b, c in zip(least, usual, largest, strict=True)):
                raise ValueError(f"the shapes of {name} must be the least, the usual and the largest")

    @property
    def static(self) -> bool:
        """Whether it takes one shape of each input and no other."""
        return all(least == largest for least, _, largest in self.shapes.values())

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes, every one of them named, can be run."""
        return shapes.keys() == self.shapes.keys() and all(
            len(shape) == len(least) and all(map(le, least, shape)) and all(map(le, shape, largest))
            for shape, (least, _, largest) in ((shapes[name], self.shapes[name]) for name in shapes)
        )

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """How far from the usual shapes these are: the sum of |log ratio| over all axes; a static profile is at 0."""
        return sum(
            abs(math.log(size / usual))
            for name, shape in shapes.items()
            for size, usual in zip(shape, self.shapes[name][1], strict=True)
        )


Figure = Annotated[float, Rule(lambda value: 0 <= value < _LARGEST_FIGURE, "be a figure that a plan can have")]


@dataclass(frozen=True, slots=True)
class Attention:
    """How many attentions of a model there are in a plan, and how many of them TensorRT fused."""

    fused: Figure
    of: Figure


@dataclass(frozen=True, slots=True)
class MadeOf:
    """The layers of a plan and the heavy ones among them, by precision, and those not in the one asked for."""

    layers: dict[str, Figure]
    heavy: dict[str, Figure]
    attention: Attention
    not_in_precision: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured when a plan was built: bytes of memory by what they hold, and what the build took."""

    made_of: MadeOf
    memory: dict[str, Figure]
    seconds: Figure
    peak_bytes: Figure
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """source: path in the bundle → SHA-256 of the ONNX model and its data. version: of the module.

    archs: GPU architectures, as `sm89`. device: the GPU of this machine that it is built on and for, "" for a plan that
    is built ahead of time. flags: of `FLAGS`.
    """

    component: str
    source: Files
    backend: str
    version: str
    archs: tuple[str, ...]
    device: str
    precision: str
    profile: Profile
    flags: tuple[str, ...] = ()

    def built_from(self) -> dict[str, Any]:
        """As JSON, for the key and the record."""
        return {**asdict(self), "flags": sorted(self.flags), "revision": _REVISION}


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan that was built of its recipe. folder: of the store. files: name → SHA-256 of its own files."""

    recipe: Recipe
    folder: Path
    key: str
    files: dict[str, str]

    @classmethod
    def read(cls, store: EngineStore, record: Mapping[str, Any]) -> Plan:
        """The plan of an engine record. Raises `EngineError` when the record is damaged or not that of its key."""
        key, files = str(record.get("key"))[:32], record.get("files")
        recipe = read(Recipe, record) if fits(Recipe, record) else None
        if recipe is None or store.key(recipe.built_from()) != key:
            raise EngineError(f"the record of the plan {key} was changed after it was built: compile the bundle again")
        if not isinstance(files, dict) or PLAN_NAME not in files or not fits(Measured, record):
            raise EngineError(f"the record of the plan {key} is damaged: compile the bundle again")
        return cls(recipe, store.root / key, key, files)

    @property
    def component(self) -> str:
        """The component whose model it runs."""
        return self.recipe.component

    @property
    def profile(self) -> Profile:
        """The shapes that it takes."""
        return self.recipe.profile

    @property
    def path(self) -> Path:
        """The serialized engine."""
        return self.folder / PLAN_NAME

    def check(self) -> None:
        """Raise `EngineError` when the plan's file is missing or was changed since it was built."""
        if not holds(self.folder, {PLAN_NAME: self.files[PLAN_NAME]}):
            raise EngineError(
                f"{self.component}: the plan {self.path} is missing or was changed after it was built: "
                "compile the bundle again"
            )


def usable(
    store: EngineStore, component: str, variant: Variant, precision: str, backend: str, version: str, gpu: Device
) -> list[Plan]:
    """The plans in `store` that this backend and GPU can run and that were built from this very model.

    Raises `EngineError` saying why there is none.
    """
    again = f"run `diffoundry build {store.root.parent} --engine {backend}"
    records = [each for each in store.records() if (each.get("component"), each.get("backend")) == (component, backend)]
    if not records:
        raise EngineError(f"{component}: the bundle holds no {backend} plan: {again}`")
    plans, damage = [], ""
    for record in records:
        try:
            plans.append(Plan.read(store, record))
        except EngineError as error:
            damage = str(error)
    if not plans:
        raise EngineError(f"{component}: {damage}")
    obstacles = [_obstacle(plan, variant, precision, version, gpu) for plan in plans]
    furthest = max(stage for stage, _ in obstacles)
    if furthest < _NO_OBSTACLE:
        why = "; ".join(dict.fromkeys(reason for stage, reason in obstacles if stage == furthest))
        raise EngineError(f"{component}: its plans are {why}: {again} --precision {precision}`")
    return [plan for plan, (stage, _) in zip(plans, obstacles, strict=True) if stage == _NO_OBSTACLE]


_NO_OBSTACLE = 4


def _obstacle(plan: Plan, variant: Variant, precision: str, version: str, gpu: Device) -> tuple[int, str]:
    """The first condition that `plan` does not meet, and why; `_NO_OBSTACLE` when it can be run."""
    recipe = plan.recipe
    if recipe.source != variant.files:
        return 0, "of another model than the bundle's"
    if recipe.precision != precision:
        return 1, f"in {recipe.precision}, {precision} is asked"
    if not _same_version(recipe, version):
        return 2, f"of {recipe.backend} {recipe.version}, installed is {version}"
    if not _same_gpu(recipe, gpu):
        return 3, f"for {recipe.device or ', '.join(recipe.archs)}, this GPU is {gpu.name} ({gpu.arch})"
    return _NO_OBSTACLE, ""


def _same_version(recipe: Recipe, version: str) -> bool:
    if "version-compatible" in recipe.flags:
        return recipe.version.split(".")[0] == version.split(".")[0]
    return recipe.version == version


def _same_gpu(recipe: Recipe, gpu: Device) -> bool:
    if "hardware-compatible" in recipe.flags:
        return int(gpu.arch[2:]) >= _OLDEST_COMPATIBLE
    return gpu.arch in recipe.archs and recipe.device in ("", gpu.name)


def closest(
    component: str, plans: Sequence[Plan], shapes: Mapping[str, Shape], tokens: Mapping[str, int] | None = None
) -> Plan:
    """The plan whose profile takes inputs of these shapes and lies closest, a static one first.

    tokens: of inputs that have tokens of text, which axis counts them.
    Raises `EngineError` saying what was asked and what the plans take.
    """
    fitting = [plan for plan in plans if plan.profile.takes(shapes)]
    if not fitting and any(0 in shape for shape in shapes.values()):
        raise EngineError(f"{component}: its plans take a picture: give one as the image, or use another --engine")
    if not fitting and tokens:
        (name, axis), *_ = tokens.items()
        own = {least[axis] for each in plans for least in each.profile.shapes[name][:1]}
        levelled = [{n: _with(shapes[n], tokens.get(n), size) for n in shapes} for size in own]
        if any(plan.profile.takes(each) for plan in plans for each in levelled):
            built = "; ".join(sorted({plan.profile.name for plan in plans}))
            raise EngineError(
                f"{component}: no plan takes {shapes[name][axis]} tokens of text; built are: {built}. Build with "
                "--tokens that hold them, or leave max_sequence_length out"
            )
    if not fitting:
        asked = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
        built = "; ".join(sorted({plan.profile.name for plan in plans}))
        raise EngineError(
            f"{component}: no plan takes {asked}; built are: {built}. Compile with a --shape and --batch that hold it"
        )
    return min(fitting, key=lambda plan: (not plan.profile.static, plan.profile.distance(shapes), plan.key))


def _with(shape: Shape, axis: int | None, size: int) -> Shape:
    """`shape` with this size along an axis, as it is where there is none."""
    return shape if axis is None else (*shape[:axis], size, *shape[axis + 1 :])
