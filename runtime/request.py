"""`Request`: what is asked for, checked before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from functools import partial, wraps
from typing import Any

import numpy as np

from ..bundle.wiring import MOST_TOKENS
from ..common.arrays import Array
from ..common.checks import LARGEST_SIDE, MOST_IMAGES, is_number, whole_number
from ..common.errors import RequestError
from .conditioning import Conditioning
from .control import Control, read_controls
from .image_prompt import ImagePrompt, read_image_prompts
from .loop.guidance import Guidance
from .loop.noise import GENERATORS
from .lora import Lora, read_loras
from .names import SAME, ours
from .pictures.autoencoder import DECODERS
from .text.prompt_syntax import parse

_SMALLEST_SEED, _LARGEST_SEED = -(2**63), 2**64 - 1
"""The seeds that `torch.Generator().manual_seed` takes."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of letters: no text can be written with one."""
_TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
_CHOICES = {
    "rng": tuple(GENERATORS),
    "output": ("image", "latent"),
    "decoder": tuple(DECODERS),
    "resize": ("default", "fill", "crop"),
}
_ONE_OF = (
    (("timesteps",), "sigmas", "are two ways to say the same"),
    (("strength",), "denoising_start", "both say where to start"),
    (("prompt", "prompt_2", "prompt_3"), "prompt_embeds", "say the same"),
    (("negative_prompt", "negative_prompt_2", "negative_prompt_3"), "negative_prompt_embeds", "say the same"),
)
"""Fields, one that does not go with any of them, and why."""
_TOGETHER = {
    "negative_prompt_2": "negative_prompt",
    "negative_prompt_3": "negative_prompt",
    "pooled_prompt_embeds": "prompt_embeds",
    "negative_pooled_prompt_embeds": "negative_prompt_embeds",
}
"""Fields that go with another one."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What to draw. None stands for the bundle's own default; a `seed` of None for a fresh random one.

    prompt_2, negative_prompt_2: for the second text encoder, where it gets others than the first; prompt_3,
    negative_prompt_3: for the third, that of Stable Diffusion 3. negative_prompt: None is none, which SDXL takes for
    nothing at all, where "" is an empty text. max_sequence_length: tokens that T5 reads of a prompt.
    scheduler: a short name or a diffusers class. scheduler_options: laid over the checkpoint's scheduler configuration.
    timesteps, sigmas: a schedule of one's own, in place of `steps`. rng: whose generator `seed` is for, `cpu` or
    `cuda`.

    image: what to start from (a path, a PIL image, an array (H, W, 3)), or latents, float32 (N, C, h, w), one image
    each. mask: bright where the image is to be drawn anew. strength: how much of the schedule is run, above 0 to 1
    (default 0.8, and 1 with a mask; 0.6 for models of flow matching).
    resize: how the image comes to size, as diffusers' `VaeImageProcessor` names it.
    forecast: after the first steps call the model in every second one alone, and forecast what it would give in the
    others, see `schedulers.forecast`.
    padding_mask_crop: draw only the part around the mask, with so many pixels about it, and lay it over the image.
    denoising_start, denoising_end: the part of the schedule, from 0 to 1, that this model runs, when two share it.

    clip_skip: layers of the text encoder to skip. weights: the prompt holds weights, see `prompt_syntax`. windows:
    a prompt that is too long takes several windows of the text encoder. prompt_embeds and the like: embeddings in
    place of the text, float32 (tokens, width), and pooled (width,).
    conditioning, negative_conditioning: what SDXL is given of sizes; the negative is the same by default.
    control: pictures that steer the drawing, see `Control`; what several add is summed. image_prompt: pictures that
    are read beside the text, see `ImagePrompt`. loras: LoRAs of this request alone, as inputs of the denoiser, where
    it takes such; those of the pipeline act as well.
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
    prompt_3: str | None = None
    negative_prompt_3: str | None = None
    max_sequence_length: int | None = None
    image: Any = None
    mask: Any = None
    strength: float | None = None
    resize: str = "default"
    padding_mask_crop: int | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    forecast: bool = False
    clip_skip: int | None = None
    weights: bool = False
    windows: bool = False
    prompt_embeds: Array | None = None
    negative_prompt_embeds: Array | None = None
    pooled_prompt_embeds: Array | None = None
    negative_pooled_prompt_embeds: Array | None = None
    conditioning: Conditioning = field(default_factory=Conditioning)
    negative_conditioning: Conditioning | None = None
    control: tuple[Control, ...] = ()
    image_prompt: tuple[ImagePrompt, ...] = ()
    loras: tuple[Lora, ...] = ()
    output: str = "image"
    decoder: str = "full"
    tiled: bool = False
    # diffusers' names, which `_by_any_name` turns into ours; they stand here for editors and type checkers
    guidance_scale: InitVar[float | None] = None
    num_inference_steps: InitVar[int | None] = None
    mask_image: InitVar[Any] = None

    def __post_init__(self, *_: Any) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _READ and (value is not None or item.default is not None):
                self._set(item.name, _READ[item.name](item.name, value))
        for name in _TEXTS if self.weights else ():
            parse(getattr(self, name) or "", name)
        for names, other, why in _ONE_OF:
            if getattr(self, other) is not None and any(getattr(self, name) not in (None, "") for name in names):
                raise RequestError(f"{names[0]} and {other} {why}: give one of them")
        for name, other in _TOGETHER.items():
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise RequestError(f"{name} goes with {other}: give both")
        self._check_image()
        if self.forecast and self.guidance.active and self.guidance.interval != (0.0, 1.0):
            raise RequestError("a forecast needs guidance in all steps: leave the guidance interval out")
        if self.forecast and self.guidance.skips:
            raise RequestError("a forecast needs the same guidance in all steps: leave skip_guidance_layers out")
        if self.seed is not None and self.seed + self.count - 1 > _LARGEST_SEED:
            raise RequestError(
                f"the seed is too large, for image i has seed + i, and the last one's would be above {_LARGEST_SEED}: "
                f"choose a smaller seed, {_LARGEST_SEED - self.count + 1} at most"
            )

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
        if self.padding_mask_crop is not None and (self.output == "latent" or self.starts_from_latents):
            raise RequestError("padding_mask_crop lays a picture over a picture: it takes no latents and gives none")
        if self.padding_mask_crop is not None and self.resize != "default":
            raise RequestError("padding_mask_crop chooses how the image is resized: leave resize out")
        start, end = self.denoising_start, self.denoising_end
        if start is not None and end is not None and start >= end:
            raise RequestError(f"denoising_start must be below denoising_end, found {start:g} and {end:g}")
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


_FIELDS = tuple(item.name for item in fields(Request))
_set_fields = Request.__init__


@wraps(_set_fields)
def _by_any_name(self: Request, *values: Any, **options: Any) -> None:
    given = {name: value for name, value in options.items() if value is not None or name not in SAME}
    _set_fields(self, *values, **ours(given, _FIELDS))


Request.__init__ = _by_any_name  # type: ignore[method-assign]


def _text(name: str, text: Any) -> str:
    """A prompt. Raises `RequestError` for what is no text; for a list, with the way to run several."""
    if isinstance(text, (list, tuple)):
        if len(text) == 1:
            raise RequestError(f"{name} must be one text, found a list of 1: give the text that is in it")
        raise RequestError(
            f"{name} must be one text, found a list of {len(text)}: run several in one batch with "
            "pipe.generate_many([diffoundry.Request('a ring', seed=1), diffoundry.Request('a star', seed=2)])"
        )
    if not isinstance(text, str):
        raise RequestError(f"{name} must be a string of text, found {type(text).__name__}")
    if SURROGATE.search(text):
        raise RequestError(f"{name} must be a string of text, found bytes that are not UTF-8")
    return text


def _kind(kind: type, refusal: str) -> Callable[[str, Any], Any]:
    """A reader of values of this kind."""

    def read(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise RequestError(refusal.format(name=name, value=value, type=type(value).__name__))
        return value

    return read


def _choice(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in _CHOICES[name]:
        raise RequestError(f"unknown {name} {value!r}: choose one of {', '.join(_CHOICES[name])}")
    return value


def _fraction(name: str, value: Any) -> float:
    """`value` as a float above 0 and at most 1 (below 1 for a denoising part)."""
    if is_number(value) and (0 < value < 1 or (value == 1 and name == "strength")):
        return float(value)
    if name == "strength":
        raise RequestError(f"strength must be above 0 and at most 1, found {value!r}: 0 would leave the image as it is")
    raise RequestError(f"{name} must be between 0 and 1, found {value!r}: leave it out to run the whole schedule")


def _embedding(name: str, value: Any) -> Array:
    """A float32 copy of an embedding."""
    rank = 1 if "pooled" in name else 2
    array: Array = np.zeros(())
    with contextlib.suppress(TypeError, ValueError, OverflowError), np.errstate(over="ignore"):
        array = np.array(value, np.float32)
    if array.ndim != rank or not array.size or not np.isfinite(array).all():
        shape = "(width,)" if rank == 1 else "(tokens, width)"
        raise RequestError(f"{name} must be finite numbers of shape {shape}, found shape {array.shape}")
    return array


def _options(name: str, options: Any) -> dict[str, Any]:
    """A copy of `options` as plain JSON values."""
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise RequestError(f"{name} must map names to values, found {options!r}")
    try:
        text = json.dumps(dict(options), allow_nan=False, default=lambda value: value.tolist())
        return dict(json.loads(text))
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise RequestError(f"{name} must hold finite numbers, texts, true, false, null and lists") from None


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """`values` as finite floats, one at least."""
    numbers: tuple[float, ...] = ()
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if isinstance(values, (list, tuple, np.ndarray)) and not any(isinstance(each, (bool, str)) for each in values):
            numbers = tuple(float(each) for each in values)
    if not numbers or not np.isfinite(numbers).all():
        raise RequestError(f"{name} must be a list of numbers, found {values!r}")
    return numbers


_READ: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(_TEXTS, _text),
    **dict.fromkeys(_CHOICES, _choice),
    **dict.fromkeys(
        ("tiled", "weights", "windows", "forecast"), _kind(bool, "{name} must be true or false, found {value!r}")
    ),
    **dict.fromkeys(("timesteps", "sigmas"), _numbers),
    **dict.fromkeys(("strength", "denoising_start", "denoising_end"), _fraction),
    **{f"{prefix}prompt_embeds": _embedding for prefix in ("", "negative_", "pooled_", "negative_pooled_")},
    **dict.fromkeys(
        ("conditioning", "negative_conditioning"), _kind(Conditioning, "{name} must be a Conditioning, found {type}")
    ),
    **dict.fromkeys(("width", "height"), partial(whole_number, low=1, high=LARGEST_SIDE)),
    "steps": partial(whole_number, low=1, high=1_000_000),
    "count": partial(whole_number, low=1, high=MOST_IMAGES),
    "seed": partial(whole_number, low=_SMALLEST_SEED, high=_LARGEST_SEED),
    "padding_mask_crop": partial(whole_number, low=0, high=LARGEST_SIDE),
    "max_sequence_length": partial(whole_number, low=1, high=MOST_TOKENS),
    "clip_skip": partial(whole_number, low=0, high=1000),
    "scheduler": _kind(str, "unknown {name} {value!r}: give the name of one"),
    "scheduler_options": _options,
    "control": read_controls,
    "image_prompt": read_image_prompts,
    "loras": read_loras,
    "guidance": lambda _, value: value if isinstance(value, Guidance) else Guidance(value),
}
"""What reads a field that was given: its value as it is kept. All raise `RequestError`."""
