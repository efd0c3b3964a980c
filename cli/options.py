"""Values of options that several verbs share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import click

from ..bundle.precisions import PRECISIONS
from ..common.errors import DiffoundryError
from ..engines.names import ENGINES as _ENGINES

_MOST_STEPS = 1_000_000
_GIB = 2**30
_MOST_GIB = 100_000
ENGINES = ", ".join(_ENGINES)
F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
threads_option = click.option("--threads", type=click.IntRange(1, 1024), help="Processors to use. [default: all]")


def engine_option(
    text: str = f"{ENGINES}. [default: what the bundle was made for]", default: str | None = None
) -> Callable[[F], F]:
    """The option `--engine`; `text` is its help."""
    return click.option("--engine", metavar="ENGINE", default=default, help=text)


def precision_option(text: str, default: str | None = None) -> Callable[[F], F]:
    """The option `--precision`; `text` is its help."""
    return click.option("--precision", type=click.Choice(list(PRECISIONS)), default=default, help=text)


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


def read_list(texts: Iterable[str]) -> list[str]:
    """The values of an option that may be repeated and holds commas."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


class Parsed(click.ParamType):  # type: ignore[type-arg]
    """An option whose text `parse` reads; what it raises is wrong usage. name: the form of the text, as in `WxH`."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # the default
            return value
        try:
            return self._parse(value)
        except DiffoundryError as error:
            self.fail(str(error), param, ctx)


class Number(click.FloatRange):
    """A number within bounds. Without `FloatRange`'s hole: NaN is on neither side of a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DiffoundryError(f"takes numbers with commas between them, found {text!r}") from None


def _counts(text: str, low: int = 1) -> tuple[int, ...]:
    numbers = _numbers(text)
    if not all(low <= number <= _MOST_STEPS and number == int(number) for number in numbers):
        raise DiffoundryError(f"takes whole numbers with commas between them, found {text!r}")
    return tuple(int(number) for number in numbers)


def _gib(text: str) -> int:
    (value, *more) = _numbers(text)
    if more or not 0 < value <= _MOST_GIB:
        raise DiffoundryError(f"takes GiB above 0 and up to {_MOST_GIB}, found {text}")
    return int(value * _GIB)


def _names(text: str) -> list[str]:
    found = read_list([text])
    if not found:
        raise DiffoundryError("names nothing: leave it out, or name one")
    return found


NUMBERS, COUNTS = Parsed("N,N,…", _numbers), Parsed("N,N,…", _counts)
LAYERS = Parsed("N,N,…", partial(_counts, low=0))
GIB, NAMES = Parsed("GIB", _gib), Parsed("NAME,…", _names)
