"""What the fields of a body ask for: a `Request`, and how it is answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..common.checks import is_number, whole_number
from ..common.errors import RequestError
from ..runtime.loop.guidance import Guidance
from ..runtime.names import SAME, ours
from ..runtime.pipeline import GUIDANCE
from ..runtime.request import SURROGATE, Request
from . import parts
from .errors import FieldError
from .models import Model
from .pictures import FORMATS

MOST_PARTIAL = 3
MOST_IMAGES, _MOST_LETTERS, MOST_STEPS = 10, 32_000, 1000
MOST_PIXELS, LARGEST_SIDE = 2048 * 2048, 4096
_MOST_PRIORITY, _LONGEST_S = 10, 86_400.0
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_GUIDANCE = {**GUIDANCE, "guidance_scale": "scale"}
_NOTHING: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "style": (),
    "moderation": ("auto", "low"),
    "background": ("auto", "opaque"),
    "input_fidelity": (),
    "complexity": (),
    "markup": (),
    "svg": (),
    "frame_count": (),
    "frame_duration_ms": (),
}
"""Fields of OpenAI's API that ask for nothing here, the values of them that are taken, and what to do for others."""
_INSTEAD = {
    "quality": "give steps=",
    "style": "say it in the prompt",
    "moderation": "nothing is moderated here",
    "background": "pictures here are opaque",
    "input_fidelity": "give strength=",
    "complexity": "give steps=",
    "markup": "draw it into the image, or give a mask",
    "svg": "pictures here are PNG, JPEG or WebP",
    "frame_count": "pictures here do not move",
    "frame_duration_ms": "pictures here do not move",
}
_ELSEWHERE = {
    "batch_size": "give n=, the number of images",
    "output_type": "this server gives pictures",
    "latents": "give seed= for the noise",
    "cross_attention_kwargs": "give loras=",
    **dict.fromkeys(
        ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback_steps"),
        "make a job, and read its events",
    ),
}
"""Options of diffusers that are not taken, where there is something else to do here than in Python."""
_ANSWER = (
    *("model", "n", "size", "response_format", "output_format", "output_compression", "stream", "partial_images"),
    *("user", "safety_identifier", "priority", "deadline"),
)
_REQUEST = tuple(item.name for item in fields(Request))
_SETTINGS = (*_REQUEST, *SAME, *_GUIDANCE)
KNOWN = (*_SETTINGS, *_NOTHING, *_ANSWER)
_SPOKEN = (
    (r"\bLoRAs?\b", "loras"),
    (r"\bcontrols?\b|\bguess_mode\b", "control"),
    (r"\bIP-Adapters?\b", "image_prompt"),
    (r"\bguidance (interval|rescale|mode)\b", r"guidance_\1"),
    (r"^(original_size|crop|target_size|aesthetic_score) of the negative\b", "negative_conditioning"),
    (r"^(original_size|crop|target_size|aesthetic_score)\b", "conditioning"),
)
"""How messages speak of what has no name of its own among the fields, and the field that it belongs to."""
_NO_HINT = "help(diffoundry.Request) lists all"
_STEPPED = ("steps", "num_inference_steps")


@dataclass(frozen=True, slots=True)
class Asked:
    """request: what is to be drawn. The rest: how it is answered.

    priority: the highest first. deadline: seconds from now. user: what the client calls its own user, said again.
    """

    request: Request
    response_format: str = "b64_json"
    output_format: str = "png"
    output_compression: int | None = None
    stream: bool = False
    partial_images: int = 0
    priority: int = 0
    deadline: float | None = None
    user: str | None = None


def model_name(given: Mapping[str, Any]) -> str | None:
    """The model that is asked for, None for any."""
    name = given.get("model")
    if name is not None and not isinstance(name, str):
        raise FieldError("model", f"model must be a text, found {type(name).__name__}")
    return name


def read_fields(given: Mapping[str, Any], model: Model, *, most_priority: int, url: str = "b64_json") -> Asked:
    """Raises `FieldError` and `RequestError` for what cannot be asked for; nothing is loaded.

    most_priority: that the client may ask for. url: the response format where none is given.
    """
    values = {name: value for name, value in given.items() if value is not None}
    _refuse_unknown(values)
    for name, taken in _NOTHING.items():
        if name in values and values.pop(name) not in taken:
            raise FieldError(name, f"{name} has no effect here ({_INSTEAD[name]}): leave it out")
    answer = _answer(values, most_priority, url)
    _limit(values)
    options = {name: value for name, value in values.items() if name not in _ANSWER and name not in _GUIDANCE}
    options |= _size(values)
    check_size((options.get("width", 1), options.get("height", 1)))
    if "n" in values and "count" in values:
        raise FieldError("n", "n and count are two names of one option: give one of them")
    count = values.get("n", values.get("count", 1))
    options["count"] = _whole("n" if "n" in values else "count", count, 1, MOST_IMAGES)
    options["guidance"] = _guidance(values)
    for name, read in _READERS.items():
        if name in options:
            options[name] = read(name, options[name])
    if "loras" in options:
        options["loras"] = parts.loras(options["loras"], model)
    options |= parts.pictures(options, model)
    return Asked(Request(**options), **answer)


def field_in(message: str) -> str | None:
    """The field that a message is about: the first that it speaks of; None where it speaks of none."""
    for pattern, name in _SPOKEN:
        if found := re.search(pattern, message):
            return found.expand(name)
    return next((word for word in re.findall(r"\w+", message) if word in _SETTINGS), None)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    for name in values:
        if name in _ELSEWHERE:
            raise FieldError(name, f"unknown option {name!r}: {_ELSEWHERE[name]}")
        if name not in KNOWN:
            try:
                ours({name: None}, KNOWN)
            except RequestError as error:
                text = str(error).replace(_NO_HINT, "the server's documentation lists all")
                raise FieldError(name[:64], f"{text:.300}") from None
    if values.get("output", "image") != "image":
        raise FieldError("output", "output must be 'image': this server gives pictures")


def _answer(values: Mapping[str, Any], most_priority: int, url: str) -> dict[str, Any]:
    """How to answer."""
    form = _choice(values, "output_format", tuple(FORMATS), "png")
    compression = values.get("output_compression")
    if compression is not None:
        compression = _whole("output_compression", compression, 0, 100)
        if form == "png" and compression != 100:
            raise FieldError("output_compression", "output_compression is for jpeg and webp: leave it out for png")
    stream = values.get("stream", False)
    if not isinstance(stream, bool):
        raise FieldError("stream", f"stream must be true or false, found {stream!r:.60}")
    partial = _whole("partial_images", values.get("partial_images", 0), 0, MOST_PARTIAL)
    deadline = values.get("deadline")
    if deadline is not None and not (is_number(deadline) and 0 < deadline <= _LONGEST_S):
        raise FieldError(
            "deadline", f"deadline must be seconds above 0, {_LONGEST_S:g} at most, found {deadline!r:.60}"
        )
    usual = min(0, most_priority)  # of a key that stands behind others
    priority = _whole("priority", values.get("priority", usual), -_MOST_PRIORITY, _MOST_PRIORITY)
    if priority > most_priority:
        raise FieldError("priority", f"priority may be {most_priority} at most for this client, found {priority}")
    user = values.get("safety_identifier") or values.get("user")
    if user is not None and (not isinstance(user, str) or len(user) > 512 or SURROGATE.search(user)):
        raise FieldError("user", "user and safety_identifier must be texts of at most 512 letters")
    return {
        "response_format": _choice(values, "response_format", ("b64_json", "url"), url),
        "output_format": form,
        "output_compression": compression,
        "stream": stream,
        "partial_images": partial,
        "priority": priority,
        "deadline": deadline,
        "user": user,
    }


def _limit(values: Mapping[str, Any]) -> None:
    """What would take the server too long, or too much memory."""
    for name, value in values.items():
        if "prompt" in name and isinstance(value, str) and len(value) > _MOST_LETTERS:
            raise FieldError(name, f"{name} has {len(value)} letters, {_MOST_LETTERS} are the most")
    for name in ("width", "height"):
        if name in values:
            _whole(name, values[name], 1, LARGEST_SIDE)
    for name in _STEPPED:
        if name in values:
            _whole(name, values[name], 1, MOST_STEPS)
    for name in ("timesteps", "sigmas"):
        if name in values and (not isinstance(values[name], list) or len(values[name]) > MOST_STEPS):
            raise FieldError(name, f"{name} must be a list of at most {MOST_STEPS} numbers")


def check_size(size: tuple[int, int]) -> None:
    """Raise `FieldError` for more pixels than are drawn here, in all or on a side."""
    if max(size) > LARGEST_SIDE:
        raise FieldError("size", f"a side of {max(size)} pixels is too long, {LARGEST_SIDE} are the most")
    if size[0] * size[1] > MOST_PIXELS:
        raise FieldError("size", f"{size[0]}x{size[1]} pixels are too many, {MOST_PIXELS} are the most")


def check_plans(size: tuple[int, int], model: Model) -> None:
    """Raise `FieldError` for a size that no plan of the model takes. It lists those that it has."""
    plans = sorted(model.pipeline.plan_sizes())
    if plans and not any(low[0] <= size[0] <= high[0] and low[1] <= size[1] <= high[1] for low, high in plans):
        sizes = dict.fromkeys("-".join(f"{each[0]}x{each[1]}" for each in dict.fromkeys(plan)) for plan in plans)
        raise FieldError("size", f"{model.name} has no plan for {size[0]}x{size[1]}, only for {', '.join(sizes)}")


def _size(values: Mapping[str, Any]) -> dict[str, int]:
    text = values.get("size", "auto")
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if text == "auto":
        return {}
    if found is None:
        raise FieldError("size", f"size must be 'auto' or WIDTHxHEIGHT, such as 512x768, found {text!r:.60}")
    if "width" in values or "height" in values:
        raise FieldError("size", "size, and width and height, say the same: give one of them")
    return {"width": int(found[1]), "height": int(found[2])}


def _guidance(values: Mapping[str, Any]) -> Guidance:
    if "guidance" in values and "guidance_scale" in values:
        raise FieldError("guidance", "guidance and guidance_scale are two names of one option: give one of them")
    return Guidance(**{name: values[key] for key, name in _GUIDANCE.items() if key in values})


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "control": parts.controls,
    "image_prompt": parts.image_prompts,
    "conditioning": parts.conditioning,
    "negative_conditioning": parts.conditioning,
}


def _whole(name: str, value: Any, low: int, high: int) -> int:
    try:
        return whole_number(name, value, low, high)
    except RequestError as error:
        raise FieldError(name, f"{error!s:.200}") from None


def _choice(values: Mapping[str, Any], name: str, choices: tuple[str, ...], usual: str) -> str:
    value = values.get(name, usual)
    if not isinstance(value, str) or value not in choices:
        raise FieldError(name, f"{name} must be one of {', '.join(choices)}, found {value!r:.60}")
    return value
