"""A request held against a bundle: what is to be run, and that it can be."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..bundle import Bundle
from ..common.errors import RequestError
from ..engines import Engine
from .conditioning import Conditioning
from .conditions.condition import Condition, Job, heeded, is_default, refuse_unheeded
from .conditions.control import ControlCondition
from .conditions.guidance import GuidanceCondition
from .conditions.image_prompt import ImagePromptCondition
from .conditions.lora import LoraCondition
from .conditions.picture import Picture
from .conditions.sizes import Sizes
from .conditions.text import Text
from .control import Control
from .image_prompt import ImagePrompt
from .loop.guidance import SKIPPING, Guidance
from .lora import Lora, printable
from .lora_sets import LoraSets
from .pictures.autoencoder import Autoencoder, check_decoder
from .pictures.preprocess import bring_to_size, open_image, open_originals, picture_size
from .request import Request
from .schedule import Schedules

_RECORDED = ("prompt", "negative_prompt", "seed", "count", "timesteps", "sigmas", "rng")
"""What a record always says; of the rest it says what is not the default."""
_OF_FEW = {name: value for name, value in asdict(Guidance()).items() if name in ("true_cfg_scale", *SKIPPING)}
"""What few models have of a guidance, and its defaults."""


class Jobs:
    """Makes jobs of requests for one bundle. conditions: those that feed them, in the order in which they are fed."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Callable[[str], Engine],
        autoencoder: Autoencoder,
        loras: LoraSets,
        adapted: Callable[[str, Sequence[Lora]], Engine],
    ) -> None:
        """engine: loads a component by its name. adapted: the same, with its weights changed by LoRAs.

        Raises `BundleError` when the scheduler's configuration cannot be read or was changed.
        """
        manifest = bundle.manifest
        self._bundle, self.schedules = bundle, Schedules(bundle)
        self.text, self._sizes = Text(bundle, engine, loras, adapted), Sizes(manifest)
        self._guidance, self._loras = GuidanceCondition(manifest), loras
        picture, self._control = Picture(manifest, autoencoder), ControlCondition(bundle, autoencoder)
        self._image_prompt = ImagePromptCondition(bundle, engine)
        self.conditions: tuple[Condition, ...] = (
            *(self.text, self._sizes, self._guidance, picture),
            *(self._control, self._image_prompt, LoraCondition(loras)),
        )

    def make(self, request: Request) -> Job:
        """Hold `request` against the bundle, before anything is loaded. Raises `RequestError` for what it cannot do."""
        guidance = request.guidance
        if guidance.scale is None:
            guidance = replace(guidance, scale=self._bundle.manifest.default_guidance)
        given, scale = self._guidance.given, guidance.scale or 0.0
        added = self._bundle.manifest.wiring.guidance_added
        guidance = guidance.raised(added)
        if given:
            true = guidance.true_cfg_scale
            guidance = replace(guidance, scale=true, mode=guidance.mode if true > 1 else "off")
        refuse_unheeded(request, self.conditions, guided=guidance.active, given=given, unguided=1 - added)
        self._check_task(request)
        check_decoder(self._bundle, request.decoder)
        image, mask = open_originals(None if request.starts_from_latents else request.image, request.mask)
        size = self._size(request, image)
        if image is None and mask is not None and mask.size != size:
            raise RequestError(
                f"the mask has {mask.width}x{mask.height} pixels, the latents are of {size[0]}x{size[1]}: "
                "give a mask of that size"
            )
        picture = None
        if request.image is not None:
            picture = bring_to_size(image, mask, size, request.resize, request.padding_mask_crop)
        controls = self._control.pixels(request, size, picture)
        loras = self._loras.of(request.loras)
        table, steps, run = self.schedules.of(request, size)
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        record = {
            **_record(request),
            "guidance": {**_guidance(request.guidance), "scale": scale},
            "scheduler_options": dict(request.scheduler_options),
            "scheduler": self.schedules.named(request.scheduler),
            "steps": steps,
            "seed": first,
            **({} if request.starts_from_latents else {"width": size[0], "height": size[1]}),
        }
        return Job(
            request,
            table,
            guidance,
            picture,
            [first + i for i in range(request.count)],
            size,
            record,
            controls,
            self._image_prompt.pixels(request),
            self._image_prompt.regions(request, size),
            loras,
            scale,
            run,
            self._loras.layout(loras),
        )

    def fields(self, task: str) -> frozenset[str]:
        """The fields that change what is drawn for `task` with guidance; of a field's own fields `field.name`."""
        blank = Image.new("L", (1, 1))
        request = Request(image=None if task == "txt2img" else blank, mask=blank if task == "inpaint" else None)
        return heeded(request, self.conditions, guided=True)

    def controls_of(self, jobs: Sequence[Job]) -> list[str] | None:
        """The components of the controls that act on these jobs, None where the plain denoiser draws them."""
        used = self._control.used(jobs)
        return used if used or any(job.request.image_prompt for job in jobs) else None

    def encode_controls(self, jobs: Sequence[Job]) -> bool:
        """Whether pictures of the controls of these jobs are encoded."""
        return self._control.encodes(jobs)

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise `RequestError` for what cannot be fed to these jobs in one batch. Nothing is loaded."""
        for condition in self.conditions:
            condition.check(jobs)

    def _check_task(self, request: Request) -> None:
        root, known = self._bundle.root, self._bundle.manifest.tasks
        if request.task in known:
            return
        if known == ("img2img",) and self._bundle.manifest.wiring.edits and request.task == "txt2img":
            raise RequestError(f"{root} draws by a picture beside the prompt: give one as the image")
        if known == ("inpaint",):
            raise RequestError(f"{root} is an inpainting model: give an image and a mask")
        if request.task == "txt2img" and self._sizes.scored:
            raise RequestError(f"{root} refines images: give one, or the latents of the model that it refines")
        raise RequestError(
            f"{root} does not hold the task {request.task}, only {', '.join(known)}: "
            f"compile the checkpoint again with --tasks {','.join((*known, request.task))}"
        )

    @property
    def layers(self) -> int:
        """The layers of the denoiser that guidance may skip some of, 0 where it skips none."""
        return self._guidance.layers

    @property
    def largest_side(self) -> int:
        """The largest width and height that a picture may have, in pixels."""
        return self._bundle.manifest.largest_side

    def _size(self, request: Request, image: Image.Image | None) -> tuple[int, int]:
        """Width and height: those asked for, else of the image or the control's, else the checkpoint's."""
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
        if image is None and request.control and not request.starts_from_latents:
            image = open_image(request.control[0].image, f"image of the control {request.control[0].name}")
        if image is not None and manifest.wiring.picture_sizes:
            width, height = picture_size(image, manifest.wiring.picture_sizes)
        elif image is not None and request.padding_mask_crop is None:
            width, height = (max(side // unit, 1) * unit for side in image.size)
        width = width if request.width is None else request.width
        height = height if request.height is None else request.height
        largest = self.largest_side
        for name, value in (("width", width), ("height", height)):
            if value < unit or value % unit or value > largest:
                near = min(max(unit, round(value / unit) * unit), largest)
                raise RequestError(
                    f"{name} must be a multiple of {unit} from {unit} to {largest}, found {value}: try {near}"
                )
        return width, height


def _guidance(guidance: Guidance) -> dict[str, Any]:
    """As JSON values; what few models have is left out where it is the default."""
    return {name: value for name, value in asdict(guidance).items() if name not in _OF_FEW or value != _OF_FEW[name]}


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
        return printable(value)
    if isinstance(value, (np.ndarray, Image.Image)):
        return f"sha256:{hashlib.sha256(np.asarray(value, order='C').tobytes()).hexdigest()}"
    if isinstance(value, list):
        return [_described(each) for each in value]
    if isinstance(value, tuple) and value and all(isinstance(each, (Control, ImagePrompt, Lora)) for each in value):
        return [{item.name: _described(getattr(each, item.name)) for item in fields(each)} for each in value]
    return asdict(value) if isinstance(value, Conditioning) else value
