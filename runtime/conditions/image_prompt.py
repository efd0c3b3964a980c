"""Pictures that are read beside the text, through the IP-Adapters of the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ...bundle import Bundle, Role
from ...bundle.wiring import ImagePrompt as Wired
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines import Engine
from ...families.control import halved
from ..image_prompt import ImagePrompt
from ..pictures.clip import clip_pixels, stretched_pixels
from ..pictures.preprocess import mask_pixels, open_image
from ..pictures.region import mask_of_queries
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
        self._given = any(each.startswith("guidance") for each in bundle.manifest.wiring.inputs.values())

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Any IP-Adapter, of any bundle: `pixels` says which it lacks."""
        return frozenset({"image_prompt"})

    def pixels(self, request: Request) -> dict[str, Array]:
        """The pictures of the request as the encoder reads them, float32 (images, 3, S, S), by the names of adapters.

        Those for the negative prompt stand after the others. Raises `RequestError` for an adapter that the bundle
        lacks, a picture that cannot be read, and embeddings or scales that do not fit.
        """
        found = {}
        names = [self._name(prompt) for prompt in request.image_prompt]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise RequestError(f"the IP-Adapter {twice[0]} is given twice: give all its images in one ImagePrompt")
        for prompt in request.image_prompt:
            wired = self._prompts[self._name(prompt)]
            if isinstance(prompt.scale, tuple) and len(prompt.scale) != wired.layers:
                what = "cross-attentions" if wired.masks else "attentions"
                raise RequestError(
                    f"the IP-Adapter {prompt.name} is read by {wired.layers} {what}, found {len(prompt.scale)} scales: "
                    "give one for each, or one number"
                )
            self._check_asked(prompt, wired)
            if prompt.embeds is not None:
                due = self._bundle.component(wired.component).inputs[0].shape[1:]
                if prompt.embeds.shape[1:] != due:
                    shape = ", ".join(map(str, ("images", *due)))
                    raise RequestError(
                        f"embeds of the IP-Adapter {prompt.name} must be ({shape}), found {prompt.embeds.shape}"
                    )
            elif not wired.encoder:
                due = self._bundle.component(wired.component).inputs[0].shape[1:]
                raise RequestError(
                    f"the IP-Adapter {self._name(prompt)} is given no pictures, but embeddings that a face model made "
                    f"of them: give embeds, (images, {', '.join(map(str, due))}), or --ip-embeds FILE"
                )
            opened = [open_image(image, f"image of the IP-Adapter {prompt.name}") for image in prompt.images]
            opened += [open_image(each, f"negative image of the IP-Adapter {prompt.name}") for each in prompt.negatives]
            if opened:
                found[self._name(prompt)] = np.stack([_pixels(each, wired) for each in opened])
        return found

    def _check_asked(self, prompt: ImagePrompt, wired: Wired) -> None:
        """Raise `RequestError` for what `prompt` asks and the adapter cannot do."""
        name = self._name(prompt)
        if prompt.mask is not None and not wired.masks:
            raise RequestError(
                f"a mask has no effect on the IP-Adapter {name}, which a transformer reads everywhere: leave it out"
            )
        if prompt.count > 1 and not wired.several:
            raise RequestError(f"the IP-Adapter {name} reads one image, found {prompt.count}: give one")
        if prompt.negative is not None and not wired.encoder:
            raise RequestError(
                f"the IP-Adapter {name} is given no pictures, but embeddings that a face model made of them: leave the "
                "negative image out"
            )

    def regions(self, request: Request, size: tuple[int, int]) -> dict[str, Array]:
        """The masks of the request at (width, height), float32 (images, H, W), by the names of adapters.

        Raises `RequestError` for one that cannot be read.
        """
        found = {}
        for prompt in request.image_prompt:
            masks = [open_image(mask, f"mask of the IP-Adapter {prompt.name}") for mask in prompt.masks]
            if masks:
                found[self._name(prompt)] = np.concatenate([mask_pixels(mask, *size) for mask in masks])
        return found

    def check(self, jobs: Sequence[Job]) -> None:
        """The jobs of a batch must have as many images for an adapter, or none, and masks for them or not.

        Negative images are read where the loop guides.
        """
        for job in jobs:
            for prompt in job.request.image_prompt:
                if prompt.negative is not None and not job.guidance.active:
                    raise RequestError(
                        f"the negative image of the IP-Adapter {self._name(prompt)} has no effect without guidance: "
                        f"leave it out, or set {'true_cfg_scale' if self._given else 'guidance'} above 1"
                    )
        for name in self._prompts:
            found = sorted(set(self._groups(name, jobs)))
            if len(found) > 1:
                said = ", ".join(f"{a * b}{' with masks' if a > 1 else ' as one' if b > 1 else ''}" for a, b in found)
                raise RequestError(
                    f"the requests of a batch must have as many images for the IP-Adapter {name}, found {said}: run "
                    "them on their own"
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
                groups, count = next(iter(self._groups(name, jobs)), (1, 1))
                positive = negative = np.zeros((groups, int(tokens) * count, int(width)), np.float32)
                scales = np.zeros((job.table.steps, wired.layers), np.float32)
            else:
                groups, _ = prompt.groups
                positive, negative = (
                    each.reshape(groups, -1, each.shape[-1]) for each in self._tokens(job, prompt, wired)
                )
                scales = prompt.scales(wired.layers, job.table.steps)
            steps = {wired.scale: scales}
            fed |= Fed(
                inputs={wired.tokens: positive, **self._masks(wired, job.regions.get(name), groups, job.size)},
                negative_inputs={wired.tokens: negative},
                prompt_steps=steps,
                negative_steps=steps,
            )
        return fed

    def _tokens(self, job: Job, prompt: ImagePrompt, wired: Wired) -> tuple[Array, Array]:
        """The tokens of the pictures, (images, tokens, width), and those of the negative ones, or of none."""
        pixels = job.image_prompts.get(self._name(prompt), np.zeros((0, 3, wired.side, wired.side), np.float32))
        own, negative = np.split(pixels, [len(prompt.images)])
        encoded = self._encoded(own, wired) if prompt.embeds is None else prompt.embeds
        if not job.guidance.active:
            empty = encoded
        elif len(negative):
            empty = self._encoded(negative, wired)
        elif wired.negative == "black":
            empty = self._encoded(_pixels(Image.new("RGB", (wired.side, wired.side)), wired)[None], wired)
        elif wired.negative == "usual" and encoded.ndim == 3:
            empty = self._encoded(np.zeros((1, 3, wired.side, wired.side), np.float32), wired)
        else:
            empty = np.zeros_like(encoded)
        empty = np.repeat(empty, len(encoded) // len(empty), axis=0)
        project = self._engine(wired.component)
        positive, negative = (project({project.inputs[0].name: each})["tokens"] for each in (encoded, empty))
        return positive, negative

    def _encoded(self, pixels: Array, wired: Wired) -> Array:
        encoder = self._engine(wired.encoder)
        return encoder({encoder.inputs[0].name: pixels})[wired.output]

    def _masks(self, wired: Wired, masks: Array | None, groups: int, size: tuple[int, int]) -> dict[str, Array]:
        """For each input that takes them, the masks at its size, float32 (groups, h, w); ones where there are none."""
        manifest = self._bundle.manifest
        axes = halved({"height": size[1] // manifest.latents.downscale, "width": size[0] // manifest.latents.downscale})
        found = {}
        for tensor in self._bundle.component(manifest.named("controlled")).inputs:
            if tensor.name in wired.masks:
                height, width = (axes[str(axis)] for axis in tensor.shape[2:])
                ones = np.ones((groups, height, width), np.float32)
                own = None if masks is None else np.stack([mask_of_queries(mask, height, width) for mask in masks])
                found[tensor.name] = ones if own is None else own
        return found

    def _groups(self, name: str, jobs: Sequence[Job]) -> list[tuple[int, int]]:
        """How each job groups its images for an adapter, of those that have any."""
        return [each.groups for job in jobs for each in job.request.image_prompt if self._name(each) == name]

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
            if self._bundle.manifest.wiring.flow is not None and not known:
                more += ", which FLUX.1 and Stable Diffusion 3 take among transformers"
            raise RequestError(f"{root} has {lacks}: compile the checkpoint again with {more}")
        return name


def _pixels(image: Image.Image, wired: Wired) -> Array:
    """A picture as the encoder reads it, float32 (3, S, S)."""
    prepared = stretched_pixels if wired.stretched else clip_pixels
    return prepared(image, wired.side, wired.mean, wired.std)
