"""The families that there are, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated

from ..bundle.reader import FieldError, Rule, read
from ..common.errors import CheckpointError
from ..common.imports import imported
from . import flux, latent_consistency, stable_diffusion, stable_diffusion_3, stable_diffusion_xl, z_image
from .family import Family

_ALL: tuple[Family, ...] = (
    stable_diffusion.FAMILY,
    stable_diffusion_xl.FAMILY,
    latent_consistency.FAMILY,
    stable_diffusion_3.FAMILY,
    flux.FAMILY,
    z_image.FAMILY,
)
_NotEmpty = Rule(bool, "not be empty")


@dataclass(frozen=True, slots=True)
class _Said:
    """What a `Family` says in so many words."""

    name: Annotated[str, _NotEmpty]
    pipelines: tuple[str, ...]
    models: dict[str, Annotated[tuple[str, ...], _NotEmpty]]
    steps: int
    guidance: float
    optional: tuple[str, ...]
    scheduler: dict[str, dict[str, bool | int]]


FAMILIES = {family.name: family for family in _ALL}


def family_named(name: str) -> Family:
    """The family called `name`, or the one that `module:NAME` is. Raises `CheckpointError` listing what there is."""
    if ":" in name:
        found = imported(name, "the family", "a Family")
        if not isinstance(found, Family):
            raise CheckpointError(f"the family {name:.200} is no diffoundry.families.Family: name one")
        try:
            said = {field.name: getattr(found, field.name) for field in fields(_Said)}
            read(_Said, {each: dict(value) if isinstance(value, Mapping) else value for each, value in said.items()})
            if not callable(found.describe):
                raise FieldError(f"describe must be a function, found {found.describe!r:.60}")
        except FieldError as error:
            raise CheckpointError(f"the family {name:.200} cannot be used: its {error}; mend it") from None
        return found
    if name not in FAMILIES:
        raise CheckpointError(
            f"unknown family {name!r:.80}: choose one of {', '.join(FAMILIES)}, or name your own as module:FAMILY"
        )
    return FAMILIES[name]


def family_of(pipeline: str) -> Family | None:
    """The family that a pipeline class of diffusers belongs to, None for an unknown class."""
    return next((family for family in FAMILIES.values() if pipeline in family.pipelines), None)
