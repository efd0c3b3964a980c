"""A built plan in the engine store: what it was built from and for, and the choice among several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle import EngineError
from ..profiles import Profile, Shape

PLAN_NAME = "plan"
CACHE_NAME = "runtime.cache"
"""What TensorRT for RTX compiled for this GPU, beside the plan; not hashed, for it grows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan. archs: GPU architectures as `sm89`. device: the GPU it was built on, "" when built ahead of time.

    flags: of `refit`, `strip`, `weight-streaming`, `version-compatible`, `hardware-compatible`.
    source: path in the bundle → SHA-256 of the ONNX files that it was built from.
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
            )
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"the record of a plan is damaged ({error}): compile the bundle again") from None

    @property
    def path(self) -> Path:
        """The serialized engine."""
        return self.folder / PLAN_NAME


def closest(component: str, plans: Sequence[Plan], shapes: Mapping[str, Shape]) -> Plan:
    """The plan whose profile takes inputs of these shapes and lies closest, a static one first.

    Raises `EngineError` saying what was asked and what the plans take.
    """
    fitting = [plan for plan in plans if plan.profile.takes(shapes)]
    if not fitting:
        asked = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
        built = "; ".join(dict.fromkeys(plan.profile.name for plan in plans))
        raise EngineError(
            f"{component}: no plan takes {asked}; built are: {built}. Compile with a --shape and --batch that hold it"
        )
    return min(fitting, key=lambda plan: (not plan.profile.static, plan.profile.distance(shapes), plan.key))
