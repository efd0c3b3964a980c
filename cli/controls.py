"""The options of `run` that make controls and image prompts of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click

from .options import read_pairs

_NAME = re.compile(r"\w+")


def read_controls(
    pictures: Iterable[str], scales: Iterable[str], intervals: Iterable[str], guess_mode: bool, detect: Iterable[str]
) -> tuple[Any, ...]:
    """A `Control` for each of `pictures`; of a ControlNet-Union a name is NAME:MODE.

    Raises `click.UsageError` for options that do not go together.
    """
    from ..runtime.control import Control
    from ..runtime.pictures.edges import CANNY, canny, check_detector

    named = read_pairs("--control", pictures, "NAME=PICTURE")
    scale_of = read_pairs("--control-scale", scales, "NAME=SCALE")
    interval_of = read_pairs("--control-interval", intervals, "NAME=START:END")
    detectors = read_pairs("--detect", (each if "=" in each else f"{each}={CANNY}" for each in detect), "NAME=DETECTOR")
    for option, found in (
        ("--control-scale", scale_of),
        ("--control-interval", interval_of),
        ("--detect", detectors),
        ("--guess-mode", {"": ""} if guess_mode and not named else {}),
    ):
        for name in found:
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
        image: Any = picture
        if name in detectors:
            check_detector(detectors[name])
            image = canny(picture)
        called, colon, mode = name.partition(":")
        if colon:
            given["mode"] = mode
        controls.append(Control(called, image, **given))
    return tuple(controls)


def read_image_prompts(pictures: Iterable[str], scales: Iterable[str], masks: Iterable[str]) -> tuple[Any, ...]:
    """An `ImagePrompt` for each adapter that is named.

    Raises `click.UsageError` for a scale without a picture, and for fewer or more masks than pictures.
    """
    from ..runtime.image_prompt import ImagePrompt

    images: dict[str, list[str]] = {}
    for name, picture in map(_named, pictures):
        images.setdefault(name, []).append(picture)
    masks_of: dict[str, list[str]] = {}
    for name, mask in map(_named, masks):
        masks_of.setdefault(name, []).append(mask)
    for name, found in masks_of.items():
        count = len(images.get(name, ()))
        if len(found) != count:
            given = f"{name}=" if name else ""
            raise click.UsageError(
                f"--ip-mask {given}PICTURE is given {len(found)} times, --ip-image {given}PICTURE {count} times: give "
                "each image a mask, in the same order"
            )
    scale_of: dict[str, float] = {}
    for name, text in map(_named, scales):
        if name not in images:
            raise click.UsageError(f"--ip-scale {text} goes with --ip-image {name + '=' if name else ''}PICTURE")
        scale_of[name] = _number("--ip-scale", name or "SCALE", text)
    return tuple(
        ImagePrompt(name, found, scale_of.get(name, 1.0), mask=masks_of.get(name)) for name, found in images.items()
    )


def _named(text: str) -> tuple[str, str]:
    """NAME=VALUE, or VALUE for the only adapter."""
    name, equals, value = text.partition("=")
    return (name, value) if equals and _NAME.fullmatch(name) else ("", text)


def _number(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"{option} {name} takes numbers, found {text!r}") from None
