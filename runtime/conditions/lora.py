"""LoRAs of a request: factors that the denoiser takes as inputs."""

from __future__ import annotations

from collections.abc import Sequence

from ...common.errors import RequestError
from ..lora_sets import LoraSets
from ..request import Request
from .condition import Condition, Fed, Job


class LoraCondition(Condition):
    """See `condition.Condition`."""

    def __init__(self, sets: LoraSets) -> None:
        self._sets = sets

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Any LoRA: `LoraSets.of` says which the bundle does not take."""
        return frozenset({"loras"})

    def check(self, jobs: Sequence[Job]) -> None:
        """The denoiser that takes LoRAs takes no controls and no pictures."""
        if not any(job.loras for job in jobs):
            return
        if any(job.request.control or job.request.image_prompt for job in jobs):
            raise RequestError(
                "the denoiser that takes LoRAs as inputs takes no controls and no image prompts: ask for one of both, "
                "or draw all with these LoRAs, by set_loras(…, as_inputs=False)"
            )

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """The factors of each job, of one rank for all, where one of them has any."""
        if not any(job.loras for job in jobs):
            return [Fed() for _ in jobs]
        layout = max(job.lora_layout for job in jobs)
        inputs = self._sets.inputs(layout)
        rank = max(self._sets.factors(job.loras, layout)[0].shape[1] for job in jobs if job.loras)
        fed = []
        for job in jobs:
            down, up = self._sets.padded(job.loras, rank, layout)
            fed.append(Fed(inputs={inputs.down: down, inputs.up: up}))
        return fed
