"""Values of options that several verbs share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click

_MOST_STEPS = 1_000_000
_GIB = 2**30
_MOST_GIB = 100_000
_ENGINES = "onnxruntime, onnxruntime:cuda, onnxruntime:tensorrt, tensorrt, tensorrt-rtx"
_PRECISIONS = ["fp32", "fp16", "bf16"]

engine_option = click.option(
    "--engine", metavar="ENGINE", help=f"{_ENGINES}. [default: what the bundle was compiled for]"
)
precision_option = click.option(
    "--precision",
    type=click.Choice(_PRECISIONS),
    help="Of the models. [default: what the bundle was compiled for; fp32 on the CPU]",
)


def read_pairs(name: str, pairs: Iterable[str], form: str = "KEY=VALUE") -> dict[str, str]:
    """KEY=VALUE pairs. Raises `click.UsageError`."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key or (not text and form != "KEY=VALUE"):
            raise click.UsageError(f"{name} takes {form}, found {pair!r}")
        if key in values:
            raise click.UsageError(f"{name} {key} is given twice")
        values[key] = text
    return values


def read_options(pairs: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it reads as JSON, else text. Raises `click.UsageError`."""
    return {key: _value(text) for key, text in read_pairs("--scheduler-option", pairs).items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def read_numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between them. Raises `click.UsageError`."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"{name} takes numbers with commas between them, found {text!r}") from None


def read_counts(name: str, text: str | None) -> list[int]:
    """Whole numbers from 1 to a million with commas between them. Raises `click.UsageError`."""
    numbers = read_numbers(name, text) or ()
    if not all(1 <= number <= _MOST_STEPS and number == int(number) for number in numbers):
        raise click.UsageError(f"{name} takes whole numbers with commas between them, found {text!r}")
    return [int(number) for number in numbers]


def read_gib(name: str, value: float) -> int:
    """GiB as bytes. Raises `click.UsageError`."""
    if not 0 < value <= _MOST_GIB:
        raise click.UsageError(f"{name} takes GiB above 0 and up to {_MOST_GIB}, found {value:g}")
    return int(value * _GIB)


def read_list(texts: Iterable[str]) -> list[str]:
    """The values of an option that may be repeated and holds commas."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]
