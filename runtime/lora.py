"""`Lora`: a file that changes weights, and how much of it; and the set of them that a pipeline runs with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..common.arrays import Array
from ..common.checks import is_finite
from ..common.errors import LoraError, RequestError
from ..common.files import read_json
from ..engines.changed import shapes_of
from ..families.lora import LoraFile, Weights
from ..families.lora.embeddings import EmbeddingFile
from ..families.lora.tensors import file_of

_MOST = 64
"""LoRAs at once."""
_LARGEST = 1000.0


def _exists(text: str) -> bool:
    """Whether a file has this name; one that no file can have is none."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _place(file: str | Path) -> str:
    """Where a file lies, or the folder around it."""
    with contextlib.suppress(LoraError, OSError, ValueError):
        file = file_of(Path(file))
    return os.path.realpath(file)


def _check_path(what: str, file: Any) -> None:
    """Raise `RequestError` for what is no path."""
    if not isinstance(file, (str, Path)) or not str(file) or "\0" in str(file):
        raise RequestError(f"{what} must be a path, found {file!r:.80}")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA of any published form. file: its path, or the folder that holds it.

    strength: how much of it, 1 as it was trained; may be negative. text_strength: the same for the text encoders, where
    it is to be another. ignore_unused: leave out keys that are for nothing in the model, which is an error otherwise.
    approximate: as an input, bring a form that is no product of two factors to the nearest one that is.
    """

    file: str | Path
    strength: float = 1.0
    text_strength: float | None = None
    ignore_unused: bool = False
    approximate: bool = False

    def __post_init__(self) -> None:
        _check_path("a LoRA", self.file)
        for name in ("strength", "text_strength"):
            value = getattr(self, name)
            if value is None and name == "text_strength":
                continue
            if not is_finite(value) or abs(value) > _LARGEST:
                raise RequestError(
                    f"{name} of the LoRA {self.file} must be a number from -{_LARGEST:g} to {_LARGEST:g}, found "
                    f"{value!r:.80}"
                )
            object.__setattr__(self, name, float(value))

    def __str__(self) -> str:
        """As `parse` reads it."""
        text = "" if self.text_strength is None else f":{self.text_strength:g}"
        return f"{self.file}={self.strength:g}{text}"

    @classmethod
    def parse(cls, text: str, *, ignore_unused: bool = False, approximate: bool = False) -> Lora:
        """`FILE`, `FILE=0.8` or `FILE=0.8:0.5`, the second number for the text encoders. Raises `RequestError`."""
        file, sign, numbers = text.rpartition("=")
        if not sign or _exists(text):
            return cls(text, ignore_unused=ignore_unused, approximate=approximate)
        try:
            own, *more = (float(each) for each in numbers.split(":"))
        except ValueError:
            raise RequestError(
                f"the LoRA {text} must be FILE, FILE=STRENGTH or FILE=STRENGTH:STRENGTH_OF_TEXT_ENCODERS"
            ) from None
        if len(more) > 1:
            raise RequestError(f"the LoRA {text} has {1 + len(more)} strengths: one for the denoiser, one for the text")
        return cls(file, own, more[0] if more else None, ignore_unused, approximate)

    def strengths(self, weights: Weights) -> dict[str, float]:
        """Its strength by component."""
        text = self.strength if self.text_strength is None else self.text_strength
        return {name: self.strength if name == weights.denoiser else text for name in weights.shapes}


@dataclass(frozen=True, slots=True)
class TextualInversion:
    """Vectors for a new word of prompts (Gal et al. 2022). file: in any published form. token: the word, where it is to
    be another than the file says."""

    file: str | Path
    token: str | None = None

    def __post_init__(self) -> None:
        _check_path("a textual inversion", self.file)
        if self.token is not None and (not isinstance(self.token, str) or not self.token.strip()):
            raise RequestError(
                f"the word of the textual inversion {self.file} must be a text, found {self.token!r:.80}"
            )

    @classmethod
    def parse(cls, text: str) -> TextualInversion:
        """`FILE` or `FILE=WORD`."""
        file, sign, token = text.rpartition("=")
        return cls(text) if not sign or _exists(text) else cls(file, token)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return str(self.file) if self.token is None else f"{self.file}={self.token}"


def as_inversions(given: Any) -> tuple[TextualInversion, ...]:
    """A list of `TextualInversion`, paths, or texts as `TextualInversion.parse` takes them. Raises `RequestError`."""
    if isinstance(given, (str, Path, TextualInversion)) or not isinstance(given, Sequence):
        raise RequestError("textual inversions are given as a list: [TextualInversion(FILE)], or [] for none")
    made = []
    for each in given:
        if not isinstance(each, (str, Path, TextualInversion)):
            raise RequestError(f"a textual inversion must be a path or a TextualInversion, found {each!r:.80}")
        made.append(TextualInversion.parse(each) if isinstance(each, str) else each)
    return tuple(TextualInversion(each) if isinstance(each, Path) else each for each in made)


def open_inversions(inversions: Sequence[TextualInversion], weights: Weights) -> dict[str, dict[str, Array]]:
    """The vector of each new word, by text encoder. Raises `LoraError`."""
    words: dict[str, dict[str, Array]] = {}
    for each in inversions:
        file = EmbeddingFile.open(each.file, weights, each.token)
        for name in file.vectors:
            own = file.words(name)
            twice = sorted(own.keys() & words.get(name, {}).keys())
            if twice:
                raise LoraError(f"{file.path}: the word {twice[0]!r:.60} is given twice: give one another, FILE=WORD")
            words.setdefault(name, {}).update(own)
    return words


def weights_of(bundle: Bundle) -> Weights:
    """What a LoRA may change in `bundle`. Raises `BundleError` for one that does not say of what it was made."""
    manifest = bundle.manifest
    denoiser = manifest.named("denoiser")
    names = [denoiser, *manifest.with_role("text")]
    config = read_json(bundle.path(f"{denoiser}/config.json"), "the configuration of the denoiser")
    layers = config.get("layers_per_block")
    return Weights(
        {name: shapes_of(bundle, name) for name in names},
        denoiser,
        layers if isinstance(layers, int) else 0,
        str(bundle.root),
        str(config.get("_class_name", "")),
    )


def read_loras(name: str, value: Any) -> tuple[Lora, ...]:
    """`value` as LoRAs, one alone or several. Raises `RequestError`."""
    return as_loras([value] if isinstance(value, (str, Path, Lora)) else value)


def as_loras(given: Any) -> tuple[Lora, ...]:
    """A list of `Lora`, paths, texts as `Lora.parse` takes them, or pairs of a path and a strength.

    Raises `RequestError` for others, and for one file twice.
    """
    if isinstance(given, (str, Path, Lora)) or not isinstance(given, Sequence):
        raise RequestError("LoRAs are given as a list: [Lora(FILE, 0.8)], or [] for none")
    made = []
    for each in given:
        if isinstance(each, Lora):
            made.append(each)
        elif isinstance(each, str):
            made.append(Lora.parse(each))
        elif isinstance(each, Path):
            made.append(Lora(each))
        elif isinstance(each, (tuple, list)) and 2 <= len(each) <= 3:
            made.append(Lora(*each))
        else:
            raise RequestError(f"a LoRA must be a Lora, a path, or a path and a strength, found {each!r:.80}")
    if len(made) > _MOST:
        raise RequestError(
            f"{len(made)} LoRAs at once are too many, {_MOST} are the most: fuse some with `compile --lora`"
        )
    places = [_place(lora.file) for lora in made]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise RequestError(f"the LoRA {made[i].file} is given twice: give it once, with the sum of its strengths")
    return tuple(made)


def open_loras(loras: Sequence[Lora], weights: Weights) -> list[tuple[LoraFile, Mapping[str, float]]]:
    """The files, read and held against `weights`, each with its strengths. Raises `LoraError`."""
    return [(open_lora(lora, weights), lora.strengths(weights)) for lora in loras]


def open_lora(lora: Lora, weights: Weights) -> LoraFile:
    """A file, read and held against `weights`. Raises `LoraError`."""
    return LoraFile.open(lora.file, weights, ignore_unused=lora.ignore_unused)


def printable(file: str | Path) -> str:
    """A path as text, whatever bytes are in it."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def described(opened: Sequence[tuple[LoraFile, Mapping[str, float]]], loras: Sequence[Lora]) -> list[dict[str, Any]]:
    """For records: the files, their hashes and strengths."""
    return [
        {
            "file": printable(lora.file),
            "sha256": file.sha256,
            "strength": lora.strength,
            "text_strength": lora.text_strength,
        }
        for (file, _), lora in zip(opened, loras, strict=True)
    ]
