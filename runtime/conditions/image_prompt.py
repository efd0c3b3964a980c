"""Pictures that are read beside the text, through the IP-Adapters of the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...bundle import Bundle, Role
from ...bundle.wiring import ImagePrompt as Wired
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines import Engine
from ..image_prompt import ImagePrompt
from ..pictures.clip import clip_pixels
from ..pictures.preprocess import open_image
from ..request import Request
from .condition import Condition, Fed, Job
from .control import parts_again


class ImagePromptCondition(Condition):
    """The tokens of the pictures, and for each step the scales; see `condition.Condition`.

    Where one job of a batch has an image prompt or a control, the others are given tokens of zeros at a scale of zero.
    """

    loads: Role | None = "image"

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine]) -> None:
        self._bundle, self._engine, self._prompts = bundle, engine, bundle.manifest.wiring.image_prompts

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Any IP-Adapter, of any bundle: `pixels` says which it lacks."""
        return frozenset({"image_prompt"})

    def pixels(self, request: Request) -> dict[str, Array]:
        """The pictures of the request as the encoder reads them, float32 (images, 3, S, S), by the names of adapters.

        Raises `RequestError` for an adapter that the bundle lacks, a picture that cannot be read, and embeddings or
        scales that do not fit.
        """
        found = {}
        names = [self._name(prompt) for prompt in request.image_prompt]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise RequestError(f"the IP-Adapter {twice[0]} is given twice: give all its images in one ImagePrompt")
        for prompt in request.image_prompt:
            wired = self._prompts[self._name(prompt)]
            if isinstance(prompt.scale, tuple) and len(prompt.scale) != wired.layers:
                raise RequestError(
                    f"the IP-Adapter {prompt.name} is read by {wired.layers} cross-attentions, found "
                    f"{len(prompt.scale)} scales: give one for each, or one number"
                )
            if prompt.embeds is not None:
                due = self._bundle.component(wired.component).inputs[0].shape[1:]
                if prompt.embeds.shape[1:] != due:
                    shape = ", ".join(map(str, ("images", *due)))
                    raise RequestError(
                        f"embeds of the IP-Adapter {prompt.name} must be ({shape}), found {prompt.embeds.shape}"
                    )
                continue
            opened = [open_image(image, f"image of the IP-Adapter {prompt.name}") for image in prompt.images]
            found[self._name(prompt)] = np.stack(
                [clip_pixels(each, wired.side, wired.mean, wired.std) for each in opened]
            )
        return found

    def check(self, jobs: Sequence[Job]) -> None:
        """The jobs of a batch must have as many images for an adapter, or none."""
        for name in self._prompts:
            counts = set(self._counts(name, jobs))
            if len(counts) > 1:
                raise RequestError(
                    f"the requests of a batch must have as many images for the IP-Adapter {name}, found "
                    f"{', '.join(map(str, sorted(counts)))}: run them on their own"
                )

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """The tokens and the scales of each adapter, where one of the jobs has an image prompt or a control."""
        if not any(job.request.image_prompt or job.request.control for job in jobs):
            return [Fed() for _ in jobs]
        return [self._fed(job, jobs) for job in jobs]

    def _fed(self, job: Job, jobs: Sequence[Job]) -> Fed:
        given = {self._name(prompt): prompt for prompt in job.request.image_prompt}
        fed = Fed()
        for name, wired in self._prompts.items():
            prompt = given.get(name)
            if prompt is None:
                tokens, width = self._bundle.component(wired.component).outputs[0].shape[1:]
                count = max(self._counts(name, jobs), default=1)
                positive = negative = np.zeros((int(tokens) * count, int(width)), np.float32)
                scales = np.zeros((job.table.steps, wired.layers), np.float32)
            else:
                positive, negative = self._tokens(job, prompt, wired)
                scales = prompt.scales(wired.layers, job.table.steps)
            steps = {wired.scale: scales}
            fed |= Fed(
                inputs={wired.tokens: positive},
                negative_inputs={wired.tokens: negative},
                prompt_steps=steps,
                negative_steps=steps,
            )
        return fed

    def _tokens(self, job: Job, prompt: ImagePrompt, wired: Wired) -> tuple[Array, Array]:
        """The tokens of the pictures, (tokens, width), and those of none: as diffusers, of an embedding of zeros, or of
        the hidden states of a picture of zeros."""
        encoder = self._engine(wired.encoder)
        pixels = job.image_prompts.get(self._name(prompt))
        if prompt.embeds is not None:
            encoded = prompt.embeds
        else:
            assert pixels is not None  # `pixels` made it of the images
            encoded = encoder({encoder.inputs[0].name: pixels})[wired.output]
        if not job.guidance.active:
            empty = encoded
        elif encoded.ndim == 2:
            empty = np.zeros_like(encoded)
        else:
            side = np.zeros((1, 3, wired.side, wired.side), np.float32)
            empty = np.repeat(encoder({encoder.inputs[0].name: side})[wired.output], len(encoded), axis=0)
        project = self._engine(wired.component)
        made = [project({project.inputs[0].name: each})["tokens"] for each in (encoded, empty)]
        positive, negative = (each.reshape(-1, each.shape[-1]) for each in made)
        return positive, negative

    def _counts(self, name: str, jobs: Sequence[Job]) -> list[int]:
        """How many images each job has for an adapter, of those that have any."""
        return [_count(each) for job in jobs for each in job.request.image_prompt if self._name(each) == name]

    def _name(self, prompt: ImagePrompt) -> str:
        """The adapter that a prompt is for."""
        name = prompt.name
        if not name and len(self._prompts) == 1:
            return next(iter(self._prompts))
        if name not in self._prompts:
            root, known = self._bundle.root, ", ".join(self._prompts)
            if not name and known:
                raise RequestError(f"{root} has the IP-Adapters {known}: say for which one the image is")
            lacks = f"no IP-Adapter {name!r:.60}, it has {known}" if known else "no IP-Adapter"
            more = parts_again(self._bundle.manifest.wiring, "--ip-adapter", name)
            raise RequestError(f"{root} has {lacks}: compile the checkpoint again with {more}")
        return name


def _count(prompt: ImagePrompt) -> int:
    """How many images it has."""
    return len(prompt.images) if prompt.embeds is None else len(prompt.embeds)
