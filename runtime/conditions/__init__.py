"""What a denoiser can be given, one file each: from the fields of a request to the inputs of a model call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...bundle import Bundle
from ...engines import Engine
from ..pictures.autoencoder import Autoencoder
from .condition import Condition, Fed, Job
from .guidance import GuidanceCondition
from .mask import Mask
from .picture import Picture
from .sizes import Sizes
from .text import Text


class Conditions:
    """The conditions of a bundle, in the order in which they are checked and fed."""

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine], autoencoder: Autoencoder) -> None:
        """engine: loads a component by its name."""
        manifest = bundle.manifest
        self.text = Text(bundle, engine)
        self.sizes = Sizes(manifest)
        self.guidance = GuidanceCondition(manifest)
        starts = (Picture(autoencoder), Mask(manifest, autoencoder))
        self.all: tuple[Condition, ...] = (self.text, self.sizes, self.guidance, *starts)

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise `RequestError` for what cannot be fed to these jobs in one batch. Nothing is loaded."""
        for condition in self.all:
            condition.check(jobs)


__all__ = ["Condition", "Conditions", "Fed", "Job"]
