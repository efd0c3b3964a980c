"""One file for each model family; `FAMILIES` finds it by name, `family_of` by the checkpoint's pipeline class."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from ...bundle import Latents, Prompt
from ...common.errors import CheckpointError
from ..checkpoint import Checkpoint
from ..plan import ComponentPlan
from . import latent_consistency, stable_diffusion, stable_diffusion_xl


class Family(Protocol):
    """What a family module offers."""

    PIPELINES: tuple[str, ...]
    DEFAULT_STEPS: int
    DEFAULT_GUIDANCE: float

    def tasks(self, checkpoint: Checkpoint) -> tuple[str, ...]: ...

    def components(self, checkpoint: Checkpoint) -> list[ComponentPlan]: ...

    def latents(self, checkpoint: Checkpoint) -> Latents: ...

    def default_size(self, checkpoint: Checkpoint) -> tuple[int, int]: ...

    def prompts(self, checkpoint: Checkpoint, folder: Path) -> dict[str, Prompt]: ...

    def options(self, checkpoint: Checkpoint) -> dict[str, bool]: ...


FAMILIES: dict[str, Family] = {
    "stable-diffusion": cast(Family, stable_diffusion),
    "stable-diffusion-xl": cast(Family, stable_diffusion_xl),
    "latent-consistency": cast(Family, latent_consistency),
}


def family_of(checkpoint: Checkpoint, name: str | None = None) -> tuple[str, Family]:
    """The family called `name`, or the one that the checkpoint's pipeline class belongs to.

    Raises `CheckpointError` listing the classes that are known.
    """
    if name is not None:
        if name not in FAMILIES:
            raise CheckpointError(f"unknown family {name!r}: choose one of {', '.join(FAMILIES)}")
        return name, FAMILIES[name]
    for key, family in FAMILIES.items():
        if checkpoint.class_name in family.PIPELINES:
            return key, family
    known = ", ".join(sorted(cls for family in FAMILIES.values() for cls in family.PIPELINES))
    raise CheckpointError(
        f"{checkpoint.root} is a {checkpoint.class_name or 'pipeline without a class name'}; "
        f"the pipeline classes known are {known} (--family overrides)"
    )
