"""The options of `run` that make controls and image prompts of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click

from .options import read_pairs

_NAME = re.compile(r"\w+")


def read_controls(
    pictures: Iterable[str],
    scales: Iterable[str],
    intervals: Iterable[str],
    guess_mode: bool,
    detect: Iterable[str],
    masks: Iterable[str] = (),
) -> tuple[Any, ...]:
    """A `Control` for each of `pictures`; of a ControlNet-Union a name is NAME:MODE.

    Raises `click.UsageError` for options that do not go together.
    """
    from ..runtime.control import Control
    from ..runtime.pictures.edges import CANNY, canny, check_detector

    named = read_pairs("--control", pictures, "NAME=PICTURE")
    scale_of = read_pairs("--control-scale", scales, "NAME=SCALE")
    interval_of = read_pairs("--control-interval", intervals, "NAME=START:END")
    mask_of = read_pairs("--control-mask", masks, "NAME=PICTURE")
    detectors = read_pairs("--detect", (each if "=" in each else f"{each}={CANNY}" for each in detect), "NAME=DETECTOR")
    for option, found in (
        ("--control-scale", scale_of),
        ("--control-interval", interval_of),
        ("--control-mask", mask_of),
        ("--detect", detectors),
        ("--guess-mode", {"": ""} if guess_mode and not named else {}),
    ):
        for name in found:
            alike = [each for each in named if name and each.partition(":")[0] == name.partition(":")[0]]
            if name not in named and alike:
                raise click.UsageError(f"{option} {name} is none of the controls that are given: {', '.join(alike)}")
            if name not in named:
                raise click.UsageError(f"{option} {name}".rstrip() + f" goes with --control {name or 'NAME'}=PICTURE")
    controls = []
    for name, picture in named.items():
        given: dict[str, Any] = {"guess_mode": guess_mode}
        if name in scale_of:
            given["scale"] = _number("--control-scale", name, scale_of[name])
        if name in interval_of:
            start, colon, end = interval_of[name].partition(":")
            if not colon:
                raise click.UsageError(f"--control-interval takes NAME=START:END, found {name}={interval_of[name]!r}")
            given["interval"] = tuple(_number("--control-interval", name, each) for each in (start, end))
        if name in mask_of:
            given["mask"] = mask_of[name]
        image: Any = picture
        if name in detectors:
            check_detector(detectors[name])
            image = canny(picture)
        called, colon, mode = name.partition(":")
        if not called:
            raise click.UsageError(f"--control {name}=PICTURE has no name: give NAME=PICTURE, or NAME:MODE=PICTURE")
        if colon:
            given["mode"] = mode
        controls.append(Control(called, image, **given))
    return tuple(controls)


def read_image_prompts(
    pictures: Iterable[str],
    embeds: Iterable[str],
    scales: Iterable[str],
    masks: Iterable[str],
    negatives: Iterable[str] = (),
) -> tuple[Any, ...]:
    """An `ImagePrompt` for each adapter that is named.

    Raises `click.UsageError` for a scale or a negative picture without a picture, and for fewer or more masks than
    pictures.
    """
    from ..runtime.image_prompt import ImagePrompt

    images: dict[str, list[str]] = {}
    pictures, embeds, scales, masks = (list(each) for each in (pictures, embeds, scales, masks))
    negatives = list(negatives)
    said = {name for name, _ in map(_named, (*pictures, *embeds, *scales, *masks, *negatives)) if name}
    only = said.pop() if len(said) == 1 else ""

    def named(text: str) -> tuple[str, str]:
        """Where one adapter alone is named, what has no name is for it, too."""
        name, value = _named(text)
        return name or only, value

    for name, picture in map(named, pictures):
        images.setdefault(name, []).append(picture)
    embeds_of: dict[str, Any] = {}
    for name, file in map(named, embeds):
        if name in images or name in embeds_of:
            raise click.UsageError(f"--ip-embeds {file} is given beside other images for the same IP-Adapter: give one")
        embeds_of[name] = _numbers(file)
    count_of = {name: len(found) for name, found in images.items()} | {n: len(each) for n, each in embeds_of.items()}
    masks_of: dict[str, list[str]] = {}
    for name, mask in map(named, masks):
        masks_of.setdefault(name, []).append(mask)
    for name, found in masks_of.items():
        count = count_of.get(name, 0)
        if len(found) != count:
            given = f"{name}=" if name else ""
            raise click.UsageError(
                f"--ip-mask {given}PICTURE is given {len(found)} times, --ip-image {given}PICTURE {count} times: give "
                "each image a mask, in the same order"
            )
    scale_of: dict[str, float] = {}
    for name, text in map(named, scales):
        if name in scale_of:
            raise click.UsageError(f"--ip-scale is given twice{f' for {name}' if name else ''}: give it once")
        if name not in count_of:
            raise click.UsageError(f"--ip-scale {text} goes with --ip-image {name + '=' if name else ''}PICTURE")
        scale_of[name] = _number("--ip-scale", name or "SCALE", text)
    negatives_of: dict[str, list[str]] = {}
    for name, picture in map(named, negatives):
        if name not in count_of:
            raise click.UsageError(f"--ip-negative {picture} goes with --ip-image {name + '=' if name else ''}PICTURE")
        negatives_of.setdefault(name, []).append(picture)
    return tuple(
        ImagePrompt(
            name,
            images.get(name),
            scale_of.get(name, 1.0),
            embeds=embeds_of.get(name),
            mask=masks_of.get(name),
            negative=negatives_of.get(name),
        )
        for name in count_of
    )


def _numbers(file: str) -> Any:
    """The array in a .npy file. Raises `click.UsageError` for anything else."""
    import numpy as np

    try:
        found = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise click.UsageError(f"--ip-embeds {file} does not exist: give a .npy file") from None
    except (OSError, ValueError, EOFError):
        raise click.UsageError(
            f"--ip-embeds {file} is no .npy file of numbers: save what the encoder gives with numpy.save"
        ) from None
    if not isinstance(found, np.ndarray) or found.ndim == 0 or found.dtype.kind not in "fiu":
        raise click.UsageError(f"--ip-embeds {file} holds no numbers (images, ...): save them with numpy.save")
    return found


def _named(text: str) -> tuple[str, str]:
    """NAME=VALUE, or VALUE for the only adapter."""
    name, equals, value = text.partition("=")
    return (name, value) if equals and _NAME.fullmatch(name) else ("", text)


def _number(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"{option} {name} takes numbers, found {text!r}") from None


def read_loras(texts: Iterable[str], ignore_unused: bool, approximate: bool = False) -> tuple[Any, ...]:
    """A `Lora` for each of `texts`. Raises `click.UsageError` for options that do not go together."""
    from ..runtime.lora import Lora

    loras = tuple(Lora.parse(text, ignore_unused=ignore_unused, approximate=approximate) for text in texts)
    for option, given in (("--lora-ignore-unused", ignore_unused), ("--lora-approximate", approximate)):
        if given and not loras:
            raise click.UsageError(f"{option} goes with --lora FILE")
    return loras
