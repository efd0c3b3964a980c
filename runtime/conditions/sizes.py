"""Sizes of the picture as inputs of the model (SDXL)."""

from __future__ import annotations

from collections.abc import Sequence

from ...bundle import Manifest
from ..request import Request
from .condition import Condition, Fed, Job


class Sizes(Condition):
    """Sizes and crop of the picture, or sizes, crop and aesthetic score; see `condition.Condition`."""

    def __init__(self, manifest: Manifest) -> None:
        self._sized = any(source.startswith("sizes") for source in manifest.wiring.inputs.values())
        self.scored = bool(manifest.wiring.inputs_from("sizes.scored"))

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """A model that is given a score gets it in the place of the target size; see `Conditioning.negative`."""
        if not self._sized:
            return frozenset()
        given = ["original_size", "crop", "aesthetic_score" if self.scored else "target_size"]
        negative = [name for name in given if name != "crop" or self.scored or request.task == "txt2img"]
        both = [f"conditioning.{name}" for name in given]
        if guided:
            both += ["negative_conditioning", *(f"negative_conditioning.{name}" for name in negative)]
        return frozenset(both)

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """The numbers for the prompt, and for the negative prompt."""
        return [self._fed(job) if self._sized else Fed() for job in jobs]

    def _fed(self, job: Job) -> Fed:
        asked, (width, height) = job.request.conditioning, job.size
        from_image = job.request.task != "txt2img"
        negative = asked.negative(job.request.negative_conditioning, scored=self.scored, from_image=from_image)
        source = "sizes.scored" if self.scored else "sizes"
        both = [{source: each.time_ids(height, width, scored=self.scored)} for each in (asked, negative)]
        return Fed(both[0], both[1])
