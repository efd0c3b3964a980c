"""A request held against a bundle: what is to be run, and that it can be."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..bundle import Bundle
from ..common.checks import LARGEST_SIDE
from ..common.errors import RequestError
from .conditioning import Conditioning
from .conditions import Conditions, Job
from .conditions.condition import is_default, refuse_unheeded
from .pictures.autoencoder import decoder_of
from .pictures.picture import bring_to_size, open_originals
from .request import Request
from .schedule import Schedules

_RECORDED = ("prompt", "negative_prompt", "seed", "count", "timesteps", "sigmas", "rng")
"""What a record always says; of the rest it says what is not the default."""


class Jobs:
    """Makes jobs of requests for one bundle."""

    def __init__(self, bundle: Bundle, conditions: Conditions) -> None:
        """Raises `BundleError` when the scheduler's configuration cannot be read or was changed."""
        self._bundle, self._conditions = bundle, conditions
        self._schedules = Schedules(bundle)

    def make(self, request: Request) -> Job:
        """Hold `request` against the bundle, before anything is loaded. Raises `RequestError` for what it cannot do."""
        guidance = request.guidance.or_default(self._bundle.manifest.default_guidance)
        guided = guidance.active and not self._conditions.guidance.given
        refuse_unheeded(request, self._conditions.all, guided=guided, given=self._conditions.guidance.given)
        self._check_task(request)
        check_decoder(self._bundle, request.decoder)
        image, mask = open_originals(request)
        size = self._size(request, image)
        if image is None and mask is not None and mask.size != size:
            raise RequestError(
                f"the mask has {mask.width}x{mask.height} pixels, the latents are of {size[0]}x{size[1]}: "
                "give a mask of that size"
            )
        table, steps = self._schedules.of(request)
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
        given = self._conditions.guidance.given
        return Job(
            request,
            table,
            replace(guidance, mode="off") if given else guidance,
            guidance.scale if given else None,
            None if request.image is None else bring_to_size(request, image, mask, size),
            [first + i for i in range(request.count)],
            size,
            record,
        )

    def _check_task(self, request: Request) -> None:
        root, known = self._bundle.root, self._bundle.manifest.tasks
        if request.task in known:
            return
        if known == ("inpaint",):
            raise RequestError(f"{root} is an inpainting model: give an image and a mask")
        if request.task == "txt2img" and self._conditions.sizes.scored:
            raise RequestError(f"{root} refines images: give one, or the latents of the model that it refines")
        raise RequestError(
            f"{root} does not hold the task {request.task}, only {', '.join(known)}: "
            f"compile the checkpoint again with --tasks {','.join((*known, request.task))}"
        )

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
        if item.name in _RECORDED or (value is not None and not is_default(item, value)):
            record[item.name] = _described(value)
    return record


def _described(value: Any) -> Any:
    """A picture or an array by its path or its hash."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (np.ndarray, Image.Image)):
        return f"sha256:{hashlib.sha256(np.asarray(value, order='C').tobytes()).hexdigest()}"
    return asdict(value) if isinstance(value, Conditioning) else value
