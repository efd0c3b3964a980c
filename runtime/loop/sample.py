"""One image on its way through the loop: what it is made of, and where it stands."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ...common.arrays import Array
from ..schedulers import Table
from .guidance import Guidance
from .noise import Generator
from .step import State

Prediction = Literal["negative", "prompt", "skipped"]
"""What the denoiser is called for: the negative prompt, the prompt, or the prompt without some layers."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The names of the denoiser's inputs that change at every step: its latents and its timestep."""

    sample: str = "sample"
    timestep: str = "timestep"


@dataclass(frozen=True, slots=True)
class KeptRegion:
    """The part of an image that inpainting keeps: after each step, noised as the step is, where the mask is 0.

    mask: float32 (1, …), 1 where the image is drawn anew. image, noise: latents, (C, …).
    """

    mask: Array
    image: Array
    noise: Array

    def blend(self, x: Array, table: Table, k: int) -> Array:
        """The latents after step k of `table`, with the kept part of the image in its place."""
        alpha, sigma = table.alpha_sigma[k + 1].astype(np.float32) if k + 1 < table.steps else (1.0, 0.0)
        kept = alpha * self.image + sigma * self.noise
        blended: Array = (1 - self.mask) * kept + self.mask * x
        return blended


@dataclass(frozen=True, slots=True)
class Skipping:
    """A third prediction of the prompt, without some layers, and what its guidance adds.

    inputs: those of the prompt, with what the denoiser is told of layers. scale: of the difference to the prompt's.
    after, before: it is made in the guided steps between these two, without them.
    """

    inputs: Mapping[str, Array]
    scale: float
    after: float
    before: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to be: its schedule, guidance and noise, its text, and the latents that it starts from.

    generator: used up by the loop, so a sample runs once. prompt, negative: the denoiser's inputs beside latents and
    timestep, without their row axis; negative is needed where the guidance is active. latents: float32 (C, …), of any
    axes. kept: for inpainting. channels: float32 (c, …), what the denoiser sees beside the latents at every step.
    prompt_steps, negative_steps: inputs as prompt and negative that change with the step, (steps, …).
    skipping: of skip-layer guidance.
    """

    table: Table
    guidance: Guidance
    generator: Generator
    prompt: Mapping[str, Array]
    negative: Mapping[str, Array] | None
    latents: Array
    kept: KeptRegion | None = None
    channels: Array | None = None
    prompt_steps: Mapping[str, Array] = field(default_factory=dict)
    negative_steps: Mapping[str, Array] = field(default_factory=dict)
    skipping: Skipping | None = None


class Row:
    """A sample in a batch."""

    def __init__(self, handle: int, sample: Sample) -> None:
        self.handle, self.sample = handle, sample
        self.state = State(sample.table, sample.latents)

    def guided(self, ahead: int = 0) -> bool:
        """Whether the step that is `ahead` steps from the next one is guided."""
        return self.sample.guidance.at(self.state.position + ahead, self.sample.table.steps)

    def skips(self) -> bool:
        """Whether a prediction with skipped layers is made in the next step."""
        skipping = self.sample.skipping
        return skipping is not None and skipping.after < self.state.position < skipping.before and self.guided()

    def inputs(self, prediction: Prediction) -> dict[str, Array]:
        """The denoiser's inputs beside latents and timestep for a prediction of the next step."""
        sample, k, changing = self.sample, self.state.position, self.changing(prediction)
        if prediction == "skipped":
            fixed = sample.skipping.inputs if sample.skipping is not None else {}
        else:
            fixed = sample.prompt if prediction == "prompt" else sample.negative or {}
        return {**fixed, **{name: values[k] for name, values in changing.items()}} if changing else dict(fixed)

    def changing(self, prediction: Prediction) -> Mapping[str, Array]:
        """The inputs of a prediction that change with the step, (steps, …)."""
        return self.sample.negative_steps if prediction == "negative" else self.sample.prompt_steps

    def phase(self, ahead: int = 0) -> Hashable:
        """What a device must be set up anew for, when it is another in the step that is `ahead` of the next one."""
        sample, k = self.sample, self.state.position + ahead
        changing = (*sample.prompt_steps.values(), *sample.negative_steps.values())
        return self.guided(ahead), *(values[k].tobytes() for values in changing)

    def draw(self) -> Array:
        """The next noise of this row, (C, …)."""
        noise: Array = self.sample.generator.randn(1, *self.sample.latents.shape)[0]
        return noise

    def advance(self, output: Array | None) -> None:
        """Make the next step from the guided model output, (C, …), None where it calls no model."""
        state, kept = self.state, self.sample.kept
        k = state.position
        state.advance(output, self.draw() if state.draws() else None)
        if kept is not None:
            state.x[...] = kept.blend(state.x, state.table, k)
