"""`Request`: what is asked for, checked before anything is loaded."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any

import numpy as np

from ..common.arrays import Array
from ..common.checks import LARGEST_SIDE, MOST_IMAGES, is_number, whole_number
from ..common.errors import RequestError
from .conditioning import Conditioning
from .loop.guidance import Guidance
from .loop.noise import GENERATORS
from .names import SAME, check_text, ours
from .pictures.autoencoder import DECODERS
from .pictures.preprocess import RESIZE_MODES
from .text.prompt_syntax import parse

OUTPUTS = ("image", "latent")
EMBEDS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
_SMALLEST_SEED, _LARGEST_SEED = -(2**63), 2**64 - 1
"""The seeds that `torch.Generator().manual_seed` takes."""
_MOST_STEPS = 1_000_000
_MOST_SKIPPED = 1000
_SURROGATE = re.compile("[\ud800-\udfff]")
_WHOLE = (
    ("steps", 1, _MOST_STEPS),
    ("count", 1, MOST_IMAGES),
    ("seed", _SMALLEST_SEED, _LARGEST_SEED),
    ("width", 1, LARGEST_SIDE),
    ("height", 1, LARGEST_SIDE),
    ("padding_mask_crop", 0, LARGEST_SIDE),
    ("clip_skip", 0, _MOST_SKIPPED),
)
_TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
_CHOICES = {"rng": tuple(GENERATORS), "output": OUTPUTS, "decoder": tuple(DECODERS), "resize": RESIZE_MODES}
_FLAGS = ("tiled", "weights", "windows")


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What to draw. None stands for the bundle's own default; a `seed` of None for a fresh random one.

    prompt_2, negative_prompt_2: for the second text encoder, where it gets others than the first. negative_prompt:
    None is none, which SDXL takes for nothing at all, where "" is an empty text.
    scheduler: a short name or a diffusers class. scheduler_options: laid over the checkpoint's scheduler configuration.
    timesteps, sigmas: a schedule of one's own, in place of `steps`. rng: whose generator `seed` is for, `cpu` or
    `cuda`.

    image: what to start from (a path, a PIL image, an array (H, W, 3)), or latents, float32 (N, C, h, w), one image
    each. mask: bright where the image is to be drawn anew. strength: how much of the schedule is run, above 0 to 1
    (default 0.8, and 1 with a mask). resize: how the image comes to size, as diffusers' `VaeImageProcessor` names it.
    padding_mask_crop: draw only the part around the mask, with so many pixels about it, and lay it over the image.
    denoising_start, denoising_end: the part of the schedule, from 0 to 1, that this model runs, when two share it.

    clip_skip: layers of the text encoder to skip. weights: the prompt holds weights, see `prompt_syntax`. windows:
    a prompt that is too long takes several windows of the text encoder. prompt_embeds and the like: embeddings in
    place of the text, float32 (tokens, width), and pooled (width,).
    conditioning, negative_conditioning: what SDXL is told of sizes; the negative is the same by default.
    guidance_scale, num_inference_steps and mask_image, as diffusers calls them, stand for guidance, steps and mask.
    output: `image`, or `latent` to leave out the decoder. decoder: `full`, or `tiny` where the bundle has it. tiled:
    work through large images in tiles, in the memory that one takes.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: Guidance = field(default_factory=Guidance)
    scheduler: str | None = None
    seed: int | None = None
    count: int = 1
    width: int | None = None
    height: int | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    rng: str = "cpu"
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    image: Any = None
    mask: Any = None
    strength: float | None = None
    resize: str = "default"
    padding_mask_crop: int | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    clip_skip: int | None = None
    weights: bool = False
    windows: bool = False
    prompt_embeds: Array | None = None
    negative_prompt_embeds: Array | None = None
    pooled_prompt_embeds: Array | None = None
    negative_pooled_prompt_embeds: Array | None = None
    conditioning: Conditioning = field(default_factory=Conditioning)
    negative_conditioning: Conditioning | None = None
    output: str = "image"
    decoder: str = "full"
    tiled: bool = False
    # diffusers' names, which `_by_any_name` turns into ours; they stand here for editors and type checkers
    guidance_scale: InitVar[float | None] = None
    num_inference_steps: InitVar[int | None] = None
    mask_image: InitVar[Any] = None

    def __post_init__(self, *_: Any) -> None:
        for name, low, high in _WHOLE:
            value = getattr(self, name)
            if value is not None or name == "count":
                self._set(name, whole_number(name, value, low, high))
        for name in _TEXTS:
            _check_text(name, getattr(self, name), optional=name != "prompt")
            if self.weights is True:
                parse(getattr(self, name) or "", name)
        if not isinstance(self.guidance, Guidance):
            self._set("guidance", Guidance(self.guidance))
        self._set("scheduler_options", _plain(self.scheduler_options))
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise RequestError(f"unknown scheduler {self.scheduler!r}: give the name of one")
        for name in ("timesteps", "sigmas"):
            self._set(name, _numbers(name, getattr(self, name)))
        if self.timesteps is not None and self.sigmas is not None:
            raise RequestError("timesteps and sigmas are two ways to say the same: give one of them")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise RequestError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, found {getattr(self, name)!r}")
        for name in EMBEDS:
            self._set(name, _embedding(name, getattr(self, name)))
        self._check_image()
        self._check_embeddings()
        if self.seed is not None and self.seed + self.count - 1 > _LARGEST_SEED:
            raise RequestError(
                f"image i has seed + i, and that of the last would be above {_LARGEST_SEED}: "
                f"choose a smaller seed, {_LARGEST_SEED - self.count + 1} at most"
            )
        for name in ("conditioning", "negative_conditioning"):
            value = getattr(self, name)
            if not isinstance(value, Conditioning) and (value is not None or name == "conditioning"):
                raise RequestError(f"{name} must be a Conditioning, found {type(value).__name__}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def task(self) -> str:
        """`txt2img`, `img2img` or `inpaint`."""
        if self.mask is not None:
            return "inpaint"
        return "txt2img" if self.image is None else "img2img"

    @property
    def starts_from_latents(self) -> bool:
        """Whether `image` holds latents."""
        return isinstance(self.image, np.ndarray) and self.image.ndim == 4

    def _check_image(self) -> None:
        for name in ("strength", "denoising_start", "denoising_end"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, _fraction(name, value))
        if self.padding_mask_crop is not None and (self.output == "latent" or self.starts_from_latents):
            raise RequestError("padding_mask_crop lays a picture over a picture: it takes no latents and gives none")
        if self.padding_mask_crop is not None and self.resize != "default":
            raise RequestError("padding_mask_crop chooses how the image is resized: leave resize out")
        if self.denoising_start is not None and self.strength is not None:
            raise RequestError("strength and denoising_start both say where to start: give one of them")
        if (
            self.denoising_start is not None
            and self.denoising_end is not None
            and self.denoising_start >= self.denoising_end
        ):
            both = f"{self.denoising_start:g} and {self.denoising_end:g}"
            raise RequestError(f"denoising_start must be below denoising_end, found {both}")
        if self.starts_from_latents:
            self._check_latents()

    def _check_latents(self) -> None:
        with np.errstate(over="ignore"):
            finite = self.image.dtype.kind == "f" and np.isfinite(self.image.astype(np.float32)).all()
        if not finite or not self.image.size:
            raise RequestError("latents must be finite float32 numbers of shape (N, C, H, W)")
        if self.width is not None or self.height is not None or self.resize != "default":
            raise RequestError("latents have a size of their own: leave width, height and resize out")
        if self.count == 1:
            self._set("count", len(self.image))
        if self.count != len(self.image):
            raise RequestError(f"{len(self.image)} latents make as many images, not {self.count}: leave count out")

    def _check_embeddings(self) -> None:
        if self.prompt_embeds is not None and (self.prompt or self.prompt_2):
            raise RequestError("prompt and prompt_embeds say the same: give one of them")
        if self.negative_prompt_embeds is not None and (self.negative_prompt or self.negative_prompt_2):
            raise RequestError("negative_prompt and negative_prompt_embeds say the same: give one of them")
        if self.negative_prompt_2 is not None and self.negative_prompt is None:
            raise RequestError("negative_prompt_2 goes with negative_prompt: give both")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = f"negative_pooled_{name[9:]}" if name.startswith("negative") else f"pooled_{name}"
            if getattr(self, pooled) is not None and getattr(self, name) is None:
                raise RequestError(f"{pooled} goes with {name}: give both")


_FIELDS = tuple(item.name for item in fields(Request))
_set_fields = Request.__init__


@functools.wraps(_set_fields)
def _by_any_name(self: Request, *values: Any, **options: Any) -> None:
    given = {name: value for name, value in options.items() if value is not None or name not in SAME}
    _set_fields(self, *values, **ours(given, _FIELDS))


Request.__init__ = _by_any_name  # type: ignore[method-assign]


def _fraction(name: str, value: Any) -> float:
    """`value` as a float above 0 and at most 1 (below 1 for a denoising part). Raises `RequestError`."""
    if name == "strength":
        if not is_number(value) or not 0 < value <= 1:
            raise RequestError(
                f"strength must be above 0 and at most 1, found {value!r}: 0 would leave the image as it is"
            )
    elif not is_number(value) or not 0 < value < 1:
        raise RequestError(f"{name} must be between 0 and 1, found {value!r}: leave it out to run the whole schedule")
    return float(value)


def _check_text(name: str, text: Any, optional: bool) -> None:
    if text is None and optional:
        return
    check_text(name, text)
    if _SURROGATE.search(text):
        raise RequestError(f"{name} must be a string of text, found bytes that are not UTF-8")


def _embedding(name: str, value: Any) -> Array | None:
    """A float32 copy of an embedding. Raises `RequestError`."""
    if value is None:
        return None
    rank = 1 if "pooled" in name else 2
    array: Array = np.zeros(())
    with contextlib.suppress(TypeError, ValueError), np.errstate(over="ignore"):
        array = np.array(value, np.float32)
    if array.ndim != rank or not array.size or not np.isfinite(array).all():
        shape = "(width,)" if rank == 1 else "(tokens, width)"
        raise RequestError(f"{name} must be finite numbers of shape {shape}, found shape {array.shape}")
    return array


def _plain(options: Any) -> dict[str, Any]:
    """A copy of `options` as plain JSON values. Raises `RequestError` for what JSON cannot hold."""
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise RequestError(f"scheduler_options must map names to values, found {options!r}")
    try:
        text = json.dumps(dict(options), allow_nan=False, default=lambda value: value.tolist())
        return dict(json.loads(text))
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise RequestError("scheduler_options must hold finite numbers, texts, true, false, null and lists") from None


def _numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """`values` as finite floats. Raises `RequestError` when they are none, or none are given."""
    if values is None:
        return None
    numbers: tuple[float, ...] = ()
    if isinstance(values, (list, tuple, np.ndarray)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            numbers = tuple(float(value) for value in values if not isinstance(value, (bool, str)))
        numbers = numbers if len(numbers) == len(values) else ()
    if not numbers or not np.isfinite(numbers).all():
        raise RequestError(f"{name} must be a list of numbers, found {values!r}")
    return numbers
