"""What `bench --serve` asks for: kinds of requests in their shares, and when each one arrives."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import BenchError

PROMPTS = (
    "a large red star at the left on a navy background",
    "a small white ring",
    "a green heart on a navy background",
)
"""Of requests that say none, in turn."""
FORM = "a share and fields, as '60% steps=4 size=512x512', with commas between values to choose from"
_SHARE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})%?", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w{0,63}")
_WHOLE = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3", "user")
"""Texts: their commas are meant."""
_NAMES = ("model", "loras")
_FILES = ("image", "mask")
_TAKEN = {"stream": "--partial-images", "partial_images": "--partial-images"}
_MOST_EACH = 64
"""Combinations of a kind's values: each is drawn once before anything is counted."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that are alike. text: as it was written, without its share. fields: values by name, one of which each
    request has."""

    text: str
    share: float
    fields: dict[str, tuple[Any, ...]]

    def each(self) -> list[dict[str, Any]]:
        """Every combination of its values."""
        return [dict(zip(self.fields, values, strict=True)) for values in itertools.product(*self.fields.values())]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of kind `kind`, by its place, that comes `at` seconds after the begin. key: the place of its key."""

    at: float
    kind: int
    fields: dict[str, Any]
    key: int = 0


def read_mix(texts: Iterable[str]) -> tuple[Kind, ...]:
    """The kinds that are written; without any, requests that leave all to the server. Raises `BenchError`."""
    kinds = tuple(_kind(text) for text in texts) or (Kind("as the server draws", 1.0, {}),)
    if not sum(kind.share for kind in kinds) > 0:
        raise BenchError("the shares of --mix are all 0: let one be more")
    return kinds


def _kind(text: str) -> Kind:
    """`[SHARE] NAME=VALUE[,VALUE…] …`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BenchError(f"--mix {text!r:.100} cannot be read ({error}): close what was opened by a quote") from None
    share = 1.0
    if words and _SHARE.fullmatch(words[0]):
        share = float(words.pop(0).removesuffix("%"))
    fields: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not value or not _NAME.fullmatch(name):
            raise BenchError(f"--mix {text!r:.100}: {word!r:.60} is no NAME=VALUE; it takes {FORM}")
        if name in fields:
            raise BenchError(f"--mix {text!r:.100}: {name} is given twice: give its values with commas between them")
        if name in _TAKEN:
            raise BenchError(f"--mix {text!r:.100}: {name} is the same for all requests: give {_TAKEN[name]}")
        fields[name] = _values(name, value)
    kind = Kind(shlex.join(words), share, fields) if words else Kind("as the server draws", share, fields)
    count = math.prod(map(len, fields.values()))
    if count > _MOST_EACH:
        raise BenchError(f"--mix {text!r:.100} has {count} combinations, {_MOST_EACH} are the most")
    return kind


def _values(name: str, text: str) -> tuple[Any, ...]:
    if name in _FILES:
        return tuple(_file(name, part) for part in text.split(","))
    if name in _WHOLE:
        return (text,)
    if text[0] in "[{":
        return (_value(text),)
    return tuple(part if name in _NAMES else _value(part) for part in text.split(","))


def _value(text: str) -> Any:
    """JSON where it reads as JSON, else the text itself."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _file(name: str, path: str) -> str:
    """The file at `path` in base64."""
    try:
        return b64encode(Path(path).read_bytes()).decode()
    except OSError as error:
        raise BenchError(f"the {name} {path} of --mix cannot be read ({error.strerror}): name a file") from None


def arrivals(
    kinds: Sequence[Kind], count: int, rate: float, seed: int, *, keys: int = 1, prompts: Sequence[str] = PROMPTS
) -> list[Arrival]:
    """`count` requests, `rate` a second on average (a Poisson process). prompts: in turn, of kinds that say none.

    At every rate they are the same ones, in the same order; only the time between them is scaled.
    """
    rng = np.random.default_rng(seed & 0xFFFFFFFF)
    shares = np.array([kind.share for kind in kinds], np.float64)
    at, found = 0.0, []
    for i in range(count):
        at += float(rng.exponential()) / rate
        kind = int(rng.choice(len(kinds), p=shares / shares.sum()))
        each = kinds[kind].each()
        fields = each[int(rng.integers(len(each)))]
        found.append(Arrival(at, kind, {"prompt": prompts[i % len(prompts)], **fields}, i % keys))
    return found
