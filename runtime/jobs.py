"""A request held against a bundle: what is to be run, and that it can be."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..bundle import Bundle
from ..common.checks import LARGEST_SIDE
from ..common.errors import RequestError
from . import tasks
from .autoencoder import decoder_of
from .conditioning import Conditioning
from .guidance import Guidance
from .inputs import Inputs, ask_of
from .request import Request
from .schedulers import Steps, Table
from .schedules import Schedules

_RECORDED = ("prompt", "negative_prompt", "seed", "count", "timesteps", "sigmas", "rng")
"""What a record always says; of the rest it says what is not the default."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request made ready. guidance: as the loop applies it; embedded: as the U-Net is told it, where it is."""

    request: Request
    table: Table
    guidance: Guidance
    embedded: float | None
    picture: tasks.Picture | None
    seeds: list[int]
    size: tuple[int, int]
    record: dict[str, Any]


class Jobs:
    """Makes jobs of requests for one bundle."""

    def __init__(self, bundle: Bundle, inputs: Inputs) -> None:
        """Raises `BundleError` when the scheduler's configuration cannot be read or was changed."""
        self._bundle, self._inputs = bundle, inputs
        self._schedules = Schedules(bundle)

    def make(self, request: Request) -> Job:
        """Hold `request` against the bundle, before anything is run. Raises `RequestError` for what it cannot do."""
        self._check_task(request)
        check_decoder(self._bundle, request.decoder)
        self._check_text(request)
        self._check_embeds(request)
        image, mask = tasks.open_originals(request)
        size = self._size(request, image)
        if image is None and mask is not None and mask.size != size:
            raise RequestError(
                f"the mask has {mask.width}x{mask.height} pixels, the latents are of {size[0]}x{size[1]}: "
                "give a mask of that size"
            )
        guidance, embedded = self._guidance(request)
        table, steps = self._table(request)
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        record = {
            **_record(request),
            "guidance": {**asdict(request.guidance), "scale": guidance.scale},
            "scheduler_options": dict(request.scheduler_options),
            "scheduler": self._schedules.named(request.scheduler),
            "steps": steps,
            "seed": first,
            **({} if request.starts_from_latents else {"width": size[0], "height": size[1]}),
        }
        picture = None if request.image is None else tasks.bring_to_size(request, image, mask, size)
        seeds = [first + i for i in range(request.count)]
        return Job(request, table, guidance, embedded, picture, seeds, size, record)

    def _guidance(self, request: Request) -> tuple[Guidance, float | None]:
        """The guidance that the loop applies, and the scale that the U-Net is told in its place."""
        guidance = request.guidance.or_default(self._bundle.manifest.default_guidance)
        if self._inputs.given_guidance:
            if guidance.rescale or guidance.interval != (0.0, 1.0) or request.says_negative:
                raise RequestError(
                    "this model is told the guidance and predicts once: a negative prompt, a rescale and an interval "
                    "have no effect, leave them out"
                )
            return replace(guidance, mode="off"), guidance.scale
        if request.says_negative and not guidance.active:
            raise RequestError(
                "the negative prompt has no effect without guidance: leave it out, or set guidance above 1"
            )
        return guidance, None

    def _check_task(self, request: Request) -> None:
        root, known = self._bundle.root, self._bundle.manifest.tasks
        if request.task in known:
            return
        if self._inputs.inpaints:
            raise RequestError(f"{root} is an inpainting model: give an image and a mask")
        if request.task == "txt2img" and "img2img" in known and self._inputs.scored:
            raise RequestError(f"{root} refines images: give one, or the latents of the model that it refines")
        raise RequestError(
            f"{root} does not hold the task {request.task}, only {', '.join(known)}: "
            f"compile the checkpoint again with --tasks {','.join((*known, request.task))}"
        )

    def _check_text(self, request: Request) -> None:
        second = request.prompt_2 is not None or request.negative_prompt_2 is not None
        if second and not self._inputs.second_text:
            raise RequestError("this model has no second text encoder: leave prompt_2 and negative_prompt_2 out")
        self._inputs.check(ask_of(request))
        plain = request.conditioning == Conditioning() and request.negative_conditioning is None
        if not plain and not self._inputs.sized:
            raise RequestError("this model is told no sizes: leave the conditioning (sizes, crop, score) out")
        for told in (request.conditioning, request.negative_conditioning or Conditioning()):
            self._check_conditioning(told)
        given = request.negative_conditioning
        scored = self._inputs.scored
        if given is not None and given.crop is not None and request.task != "txt2img" and not scored:
            raise RequestError("from an image, the negative is told the crop of the prompt: leave its own out")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            if getattr(request, name) is not None and (getattr(request, pooled) is None) == self._inputs.pooled:
                needs = "needs" if self._inputs.pooled else "takes no"
                raise RequestError(f"this model {needs} {pooled} beside {name}")

    def _check_conditioning(self, told: Conditioning) -> None:
        if told.aesthetic_score is not None and not self._inputs.scored:
            raise RequestError("this model is told no aesthetic score: leave it out")
        if told.target_size is not None and self._inputs.scored:
            raise RequestError("this model is told a score in the place of the target size: leave the size out")

    def _check_embeds(self, request: Request) -> None:
        for name, taken in (
            ("prompt_embeds", "text.hidden"),
            ("negative_prompt_embeds", "text.hidden"),
            ("pooled_prompt_embeds", "text.pooled"),
            ("negative_pooled_prompt_embeds", "text.pooled"),
        ):
            value, width = getattr(request, name), self._inputs.widths.get(taken)
            if value is not None and isinstance(width, int) and value.shape[-1] != width:
                raise RequestError(f"{name} must be {width} wide for this model, found shape {value.shape}")

    def _table(self, request: Request) -> tuple[Table, int]:
        """The calls that a request makes, and the steps of the whole schedule."""
        manifest = self._bundle.manifest
        count = manifest.default_steps if request.steps is None else request.steps
        asked = Steps(count, timesteps=request.timesteps, sigmas=request.sigmas)

        def make(steps: Steps) -> Table:
            return self._schedules.table(steps, request.task, request.scheduler, request.scheduler_options)

        if request.timesteps is not None or request.sigmas is not None:
            asked = replace(asked, count=make(asked).steps)
        consistency = manifest.wiring.strength_by_sampler and self._schedules.is_consistency(request.scheduler)
        table = tasks.schedule(request, asked, make, self._schedules.train_steps, by_strength=consistency)
        return table, asked.count

    def _size(self, request: Request, image: Image.Image | None) -> tuple[int, int]:
        """Width and height: those asked for, else of the image where it is redrawn whole, else the checkpoint's."""
        manifest = self._bundle.manifest
        unit, channels = manifest.latents.unit, manifest.latents.channels
        if request.starts_from_latents:
            found = request.image.shape
            if found[1] != channels:
                raise RequestError(f"latents must have {channels} channels, found shape {found}")
            multiple, down = manifest.latents.multiple, manifest.latents.downscale
            if found[2] % multiple or found[3] % multiple:
                raise RequestError(f"the sides of latents must be multiples of {multiple}, found shape {found}")
            return down * found[3], down * found[2]
        width, height = manifest.default_width, manifest.default_height
        if image is not None and request.padding_mask_crop is None:
            width, height = (max(side // unit, 1) * unit for side in image.size)
        width = width if request.width is None else request.width
        height = height if request.height is None else request.height
        for name, value in (("width", width), ("height", height)):
            if value < unit or value % unit or value > LARGEST_SIDE:
                near = min(max(unit, round(value / unit) * unit), LARGEST_SIDE)
                raise RequestError(
                    f"{name} must be a multiple of {unit} from {unit} to {LARGEST_SIDE}, found {value}: try {near}"
                )
        return width, height


def check_decoder(bundle: Bundle, decoder: str) -> None:
    """Raise `RequestError` when the bundle lacks this decoder."""
    if not decoder_of(bundle.manifest, decoder):
        raise RequestError(
            f"{bundle.root} has no {decoder} decoder: compile the checkpoint again with "
            "--component vae_tiny=FOLDER, the folder of an AutoencoderTiny"
        )


def _record(request: Request) -> dict[str, Any]:
    """What makes the request again, as JSON values."""
    record: dict[str, Any] = {}
    for item in fields(request):
        value = getattr(request, item.name)
        if item.name in _RECORDED or (value is not None and not _is_default(item, value)):
            record[item.name] = _described(value)
    return record


def _is_default(item: Any, value: Any) -> bool:
    if isinstance(value, (np.ndarray, Image.Image)):
        return False
    return bool(value == (item.default_factory() if callable(item.default_factory) else item.default))


def _described(value: Any) -> Any:
    """A picture or an array by its path or its hash."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (np.ndarray, Image.Image)):
        return f"sha256:{hashlib.sha256(np.asarray(value, order='C').tobytes()).hexdigest()}"
    return asdict(value) if isinstance(value, Conditioning) else value
