"""A condition: one thing that a denoiser can be given, from the fields of a request to the inputs of a model call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ...bundle import Role
from ...common.arrays import Array
from ...common.errors import RequestError
from ..loop.guidance import SKIPPING, Guidance
from ..loop.noise import Generator
from ..loop.sample import KeptRegion
from ..lora import Lora
from ..pictures.preprocess import Picture
from ..request import Request
from ..schedulers import Table

_NO_IMAGE = "without an image: give an image, or leave it out"
_NO_GUIDANCE = "without guidance: leave it out, or set guidance above {}"
_NO_NEGATIVE = (
    "on this model, which is given the guidance and predicts once: leave it out, or set true_cfg_scale above 1"
)
_ALWAYS = frozenset(
    {
        *("seed", "rng", "count", "width", "height", "output"),
        *("steps", "timesteps", "sigmas", "scheduler", "scheduler_options", "denoising_end", "forecast"),
    }
)
"""Fields that act on every image."""
_WHY = {
    "mask": _NO_IMAGE,
    "strength": _NO_IMAGE,
    "resize": _NO_IMAGE,
    "denoising_start": _NO_IMAGE,
    "padding_mask_crop": "without a mask: give a mask, or leave it out",
    "decoder": "on latents: leave it out",
    "tiled": "on latents: leave it out",
    "prompt_2": "on this model, which has no second text encoder: leave it out",
    "negative_prompt_2": "on this model, which has no second text encoder: leave it out",
    "prompt_3": "on this model, which has no third text encoder: leave it out",
    "negative_prompt_3": "on this model, which has no third text encoder: leave it out",
    "max_sequence_length": "where embeddings are given, or text encoders have one length: leave it out",
    **dict.fromkeys(
        (f"guidance.{name}" for name in SKIPPING),
        "on this bundle, whose denoiser skips no layers: leave it out, or compile the checkpoint again where it is of "
        "Stable Diffusion 3",
    ),
    "guidance.true_cfg_scale": "on this model, which is not given the guidance: leave it out, and give it as guidance",
}
"""What is missing where a field has no effect, if it is more than the model."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request checked against a bundle, with all that the loop needs.

    guidance: of the loop, off where the model is given its scale as an input and no other is asked for. given: that
    scale. size: width and height in pixels. steps: of its schedule, those that it runs.
    record: the request as JSON values, to ask for it again. controls, image_prompts: their pictures, by
    the names of controls and of IP-Adapters; those of masked controls have the mask as a last channel.
    regions: the masks of image prompts, float32 (images, H, W) of 0 and 1.
    loras: that the denoiser takes as inputs, in the layout lora_layout; see `LoraDenoiser`.
    """

    request: Request
    table: Table
    guidance: Guidance
    picture: Picture | None
    seeds: list[int]
    size: tuple[int, int]
    record: dict[str, Any]
    controls: Mapping[str, Array] = field(default_factory=dict)
    image_prompts: Mapping[str, Array] = field(default_factory=dict)
    regions: Mapping[str, Array] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    given: float = 0.0
    steps: int = 0
    lora_layout: int = 0


class Start(NamedTuple):
    """What a row starts with; see `loop.sample.Sample`."""

    latents: Array
    kept: KeptRegion | None = None
    channels: Array | None = None


Starter = Callable[[int, Generator], Start]
"""Makes what image i of a request starts with, from its generator."""


@dataclass(frozen=True, slots=True)
class Fed:
    """What a condition gives the rows of one job.

    prompt, negative: by source (see `bundle.wiring.SOURCES`), without their row axis, for the rows with the prompt and
    with the negative prompt. truncated: the parts of prompts that did not fit, by the name of the prompt.
    start: where the condition decides what the images start with.
    inputs: by the names of the denoiser's inputs, for all rows; negative_inputs: in their place, for rows with the
    negative prompt; skipped_inputs: for rows with skipped layers. prompt_steps, negative_steps: the same, for each
    step, (steps, …), of rows with the prompt and with the negative prompt.
    of_prompt: sources of the prompt, by the names of inputs that all rows are given them by. drawn: makes inputs of an
    image from its generator, before what it starts with is drawn.
    """

    prompt: Mapping[str, Array] = field(default_factory=dict)
    negative: Mapping[str, Array] = field(default_factory=dict)
    truncated: Mapping[str, str] = field(default_factory=dict)
    start: Starter | None = None
    inputs: Mapping[str, Array] = field(default_factory=dict)
    negative_inputs: Mapping[str, Array] = field(default_factory=dict)
    prompt_steps: Mapping[str, Array] = field(default_factory=dict)
    negative_steps: Mapping[str, Array] = field(default_factory=dict)
    skipped_inputs: Mapping[str, Array] = field(default_factory=dict)
    of_prompt: Mapping[str, str] = field(default_factory=dict)
    drawn: Callable[[Generator], Mapping[str, Array]] | None = None

    def __or__(self, other: Fed) -> Fed:
        """What two conditions of one job give together."""
        return Fed(
            {**self.prompt, **other.prompt},
            {**self.negative, **other.negative},
            {**self.truncated, **other.truncated},
            other.start or self.start,
            {**self.inputs, **other.inputs},
            {**self.negative_inputs, **other.negative_inputs},
            {**self.prompt_steps, **other.prompt_steps},
            {**self.negative_steps, **other.negative_steps},
            {**self.skipped_inputs, **other.skipped_inputs},
            {**self.of_prompt, **other.of_prompt},
            other.drawn or self.drawn,
        )


class Condition(Protocol):
    """One thing that a denoiser can be given. loads: the role of the components that feeding it takes, if any."""

    loads: Role | None = None

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """The fields of `request` that change something, given all the others; of a field's own fields `field.name`.

        guided: whether the loop guides, and so has rows with the negative prompt.
        """

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise `RequestError` for what cannot be fed to the rows of these jobs in one batch. Nothing is loaded."""
        return

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """What each job gets. Engines that make it are loaded here."""


def asked(request: Request) -> Iterator[str]:
    """The fields of a request that are not at their default, and the fields of those that have some."""
    for item in fields(request):
        value = getattr(request, item.name)
        is_empty = value is None or (isinstance(value, str) and not value)  # which asks for nothing
        if not is_empty and not is_default(item, value):
            inner = [(each, getattr(value, each.name)) for each in fields(value)] if is_dataclass(value) else []
            yield from [f"{item.name}.{each.name}" for each, own in inner if not is_default(each, own)] or [item.name]


def heeded(request: Request, conditions: Iterable[Condition], *, guided: bool) -> frozenset[str]:
    """The fields that change what `request` draws, given all the others; of a field's own fields `field.name`."""
    return _ALWAYS.union(*(condition.heeds(request, guided) for condition in conditions))


def refuse_unheeded(
    request: Request, conditions: Iterable[Condition], *, guided: bool, given: bool, unguided: float = 1
) -> None:
    """Raise `RequestError` for a field that was asked for and that no condition heeds.

    guided: see `Condition.heeds`. given: whether the model is given the guidance as an input. unguided: the guidance
    that is none.
    """
    known = heeded(request, conditions, guided=guided)
    for name in asked(request):
        if name in known:
            continue
        why = _WHY.get(name, "on this model: leave it out")
        if why == _NO_IMAGE and request.image is not None:
            why = "on this model, which sees the image and starts from noise: leave it out"
        is_of_model = name.startswith("guidance.") and name in _WHY
        if name.startswith(("negative", "guidance.")) and not guided and not is_of_model:
            why = _NO_NEGATIVE if given else _NO_GUIDANCE.format(f"{unguided:g}")
        raise RequestError(f"{_said(name)} has no effect {why}")


def _said(name: str) -> str:
    """A field as a person calls it: the inner name where a field has fields of its own."""
    outer, _, inner = name.partition(".")
    if outer == "guidance":
        return inner if "_" in inner else f"the guidance {inner}"
    return f"{inner} of the negative" if outer.startswith("negative") and inner else inner or outer


def is_default(item: Any, value: Any) -> bool:
    """Whether `value` is what the field `item` of a dataclass is by default."""
    if isinstance(value, (np.ndarray, Image.Image)):
        return False
    return bool(value == _default(item))


@cache
def _default(item: Any) -> Any:
    """Made once, as reading a request asks for it again and again. To compare with, not to be changed."""
    return item.default_factory() if callable(item.default_factory) else item.default
