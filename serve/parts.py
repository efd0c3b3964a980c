"""Fields that are objects: controls, image prompts, LoRAs, sizes, and the pictures in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from PIL import Image

from ..runtime.conditioning import Conditioning
from ..runtime.control import Control
from ..runtime.image_prompt import ImagePrompt
from ..runtime.lora import Lora
from .errors import FieldError
from .models import Model
from .pictures import mask, part_error, picture

_MOST = 16
"""Pictures, controls, image prompts or LoRAs of a request."""


def pictures(options: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The image and the mask; more images are read beside the prompt, by a model that can."""
    if "mask" in options and "mask_image" in options:
        raise FieldError("mask", "mask and mask_image are two names of one option: give one of them")
    made: dict[str, Any] = {name: mask(name, options[name]) for name in ("mask", "mask_image") if name in options}
    if "image" not in options:
        return made
    given = options["image"] if isinstance(options["image"], list) else [options["image"]]
    if not 1 <= len(given) <= _MOST:
        raise FieldError("image", f"image takes from 1 to {_MOST} pictures, found {len(given)}")
    adapters = list(model.pipeline.bundle.manifest.wiring.image_prompts)
    if len(given) > 1 and (len(adapters) != 1 or "image_prompt" in options):
        raise FieldError("image", f"{model.name} starts from one picture, found {len(given)}: give one")
    made["image"], *others = (picture("image", each) for each in given)
    if others:
        made["image_prompt"] = (ImagePrompt(adapters[0], others),)
    return made


def loras(value: Any, model: Model) -> tuple[Lora, ...]:
    """LoRAs by the names that the server was started with: no path of a request is opened."""
    made = []
    for each in _listed("loras", value):
        if isinstance(each, str):
            name, sign, strength = each.partition("=")
            each = {"name": name, **({"strength": _number("loras", strength)} if sign else {})}
        given = _object("loras", each, ("name", "strength", "text_strength"))
        name = given.pop("name", None)
        if not isinstance(name, str) or name not in model.loras:
            has = f"it has {', '.join(model.loras)}" if model.loras else "it has none"
            raise FieldError("loras", f"{model.name} has no LoRA {name!r:.60}, {has}; a file cannot be named here")
        made.append(Lora(model.loras[name], **given))
    return tuple(made)


def controls(name: str, value: Any) -> tuple[Control, ...]:
    """Controls, with their pictures. Raises `FieldError` and `RequestError`."""
    known, made = tuple(item.name for item in fields(Control)), []
    for each in _listed(name, value):
        given = _object(name, each, known, needs=("name", "image"))
        given["image"] = picture(f"image of {name}", given["image"])
        if given.get("mask") is not None:
            given["mask"] = mask(f"mask of {name}", given["mask"])
        made.append(Control(**given))
    return tuple(made)


def image_prompts(name: str, value: Any) -> tuple[ImagePrompt, ...]:
    """Pictures that are read beside the prompt. Raises `FieldError` and `RequestError`."""
    known, made = tuple(item.name for item in fields(ImagePrompt)), []
    for each in _listed(name, value):
        given = {"name": "", **_object(name, each, known)}
        for part in ("image", "mask", "negative"):
            if given.get(part) is not None:
                given[part] = _all(f"{part} of {name}", given[part])
        made.append(ImagePrompt(**given))
    return tuple(made)


def _all(name: str, value: Any) -> list[Image.Image]:
    given = value if isinstance(value, list) else [value]
    if not 1 <= len(given) <= _MOST:
        raise part_error(name, f"{name} takes from 1 to {_MOST} pictures, found {len(given)}")
    return [picture(name, each) for each in given]


def _listed(name: str, value: Any) -> list[Any]:
    given = value if isinstance(value, list) else [value]
    if len(given) > _MOST:
        raise FieldError(name, f"{name} takes at most {_MOST}, found {len(given)}")
    return given


def _object(name: str, value: Any, known: tuple[str, ...], needs: tuple[str, ...] = ()) -> dict[str, Any]:
    """A copy of an object that has these fields alone."""
    if not isinstance(value, dict):
        raise FieldError(name, f"{name} must be an object with {', '.join(known)}, found {type(value).__name__}")
    for key in value:
        if key not in known:
            raise FieldError(name, f"{name} has no {key!r:.60}, only {', '.join(known)}")
    for key in needs:
        if key not in value:
            raise FieldError(name, f"{name} needs {key}")
    return dict(value)


def conditioning(name: str, value: Any) -> Conditioning:
    """Sizes and score of SDXL. Raises `FieldError` and `RequestError`."""
    return Conditioning(**_object(name, value, tuple(item.name for item in fields(Conditioning))))


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise FieldError(name, f"the strength of {name} must be a number, found {text!r:.60}") from None
