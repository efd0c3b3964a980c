"""All that decides a plan, and the key that it is kept under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...common.errors import EngineError
from ..cache import EngineStore
from ..profiles import Profile

FLAGS = ("refit", "strip", "weight-streaming", "version-compatible", "hardware-compatible")
_REVISION = 1
"""Raise it when the same inputs are built in another way."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """source: path in the bundle → SHA-256 of the ONNX model and its data. version: of the module.

    archs: GPU architectures, as `sm89`. device: the GPU of this machine that it is built on and for, "" for a plan that
    is built ahead of time. flags: of `FLAGS`.
    """

    component: str
    source: dict[str, str]
    backend: str
    version: str
    archs: tuple[str, ...]
    device: str
    precision: str
    profile: Profile
    flags: tuple[str, ...] = ()

    def built_from(self) -> dict[str, Any]:
        """As JSON, for the key and the record."""
        return {
            "component": self.component,
            "source": self.source,
            "backend": self.backend,
            "version": self.version,
            "archs": list(self.archs),
            "device": self.device,
            "precision": self.precision,
            "profile": self.profile.to_json(),
            "flags": sorted(self.flags),
            "revision": _REVISION,
        }

    @classmethod
    def from_record(cls, store: EngineStore, record: Mapping[str, Any]) -> Recipe:
        """What the record of a plan says. Raises `EngineError` when that is not what its key was made of."""
        try:
            recipe = cls(
                component=record["component"],
                source=dict(record["source"]),
                backend=record["backend"],
                version=record["version"],
                archs=tuple(record["archs"]),
                device=record["device"],
                precision=record["precision"],
                profile=Profile.from_json(record["profile"]),
                flags=tuple(record["flags"]),
            )
            same = store.key(recipe.built_from()) == record["key"]
        except (LookupError, TypeError, ValueError):
            same = False
        if not same:
            key = str(record.get("key"))[:32]
            raise EngineError(f"the record of the plan {key} was changed after it was built: compile the bundle again")
        return recipe
