"""The families that there are, by their names."""

from __future__ import annotations

from collections.abc import Mapping

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
FAMILIES = {family.name: family for family in _ALL}


def family_named(name: str) -> Family:
    """The family called `name`, or the one that `module:NAME` is. Raises `CheckpointError` listing what there is."""
    if ":" in name:
        found = imported(name, "the family", "a Family")
        if not isinstance(found, Family):
            raise CheckpointError(f"the family {name:.200} is no diffoundry.families.Family: name one")
        if not (isinstance(found.name, str) and isinstance(found.models, Mapping) and callable(found.describe)):
            raise CheckpointError(
                f"the family {name:.200} must have a text as name, a mapping as models and a function as describe: "
                "mend it"
            )
        return found
    if name not in FAMILIES:
        raise CheckpointError(
            f"unknown family {name!r:.80}: choose one of {', '.join(FAMILIES)}, or name your own as module:FAMILY"
        )
    return FAMILIES[name]


def family_of(pipeline: str) -> Family | None:
    """The family that a pipeline class of diffusers belongs to, None for an unknown class."""
    return next((family for family in FAMILIES.values() if pipeline in family.pipelines), None)
