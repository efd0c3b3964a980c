"""Textual inversion (Gal et al. 2022): files that hold vectors for a new word, one matrix for each text encoder.

{"<cat>": (n, width)}                                  diffusers
{"string_to_param": {"*": (n, width)}, "name": …}      A1111, a pickle
{"emb_params": (n, width)}                             A1111, safetensors, named by the file
{"clip_l": (n, 768), "clip_g": (n, 1280)}              of XL
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...common.arrays import Array
from ...common.errors import LoraError
from ...common.files import sha256_file
from .reader import Weights
from .tensors import read_tensors

_NAMELESS = ("emb_params", "string_to_param.*", "*", "")
_OF_XL = ({"clip_l": 0, "clip_g": 1}, {"text_encoders_0": 0, "text_encoders_1": 1})
_MOST_VECTORS = 75
"""What a window of CLIP holds."""
MATRIX = "token_embedding.weight"
"""How the name of the weight ends that has a row for each token."""


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """A word and its vectors, float32 (n, width), by text encoder."""

    path: Path
    sha256: str
    token: str
    vectors: Mapping[str, Array] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, weights: Weights, token: str | None = None) -> EmbeddingFile:
        """token: the word, where it is to be another than the file says.

        Raises `LoraError` for a damaged file, one of another kind, or of a width that no text encoder has.
        """
        file = Path(path)
        tensors, metadata = read_tensors(file)
        matrices = {
            name: np.atleast_2d(each.astype(np.float32)) for name, each in tensors.items() if each.dtype.kind == "f"
        }
        matrix = {name: _matrix(weights, name) for name in weights.texts}
        widths = {name: found[1][1] for name, found in matrix.items() if found is not None}
        if not widths:
            raise LoraError(
                f"{file} has a new word, for which the text encoders of {weights.title} have no place: textual "
                "inversions go with CLIP's"
            )
        found: dict[str, Array] = {}
        said = ""
        for keys in _OF_XL:
            if keys.keys() == matrices.keys():
                order = sorted(widths)
                if len(order) == 1:
                    raise LoraError(
                        f"{file} has vectors for two text encoders ({' and '.join(keys)}), {weights.title} has one: it "
                        "was made for another model"
                    )
                found = {order[i]: matrices[key] for key, i in keys.items() if i < len(order)}
        if not found:
            kept = {name: each for name, each in matrices.items() if name in ("string_to_param.*",)} or matrices
            if len(kept) != 1:
                raise LoraError(
                    f"{file} is no textual inversion: it has {len(kept)} tensors ({', '.join(list(kept)[:3])}); give a "
                    "LoRA with --lora"
                )
            [(said, vectors)] = kept.items()
            found = {name: vectors for name, width in widths.items() if width == vectors.shape[1]}
            if not found:
                raise LoraError(
                    f"{file} has vectors of width {vectors.shape[1]}, the text encoders of {weights.title} "
                    f"{' and '.join(str(width) for width in widths.values())}: it was made for another model"
                )
        for name, vectors in found.items():
            if vectors.ndim != 2 or vectors.shape[1] != widths[name] or not 1 <= len(vectors) <= _MOST_VECTORS:
                raise LoraError(
                    f"{file} has {len(vectors)} vectors of width {vectors.shape[-1]}, {name} takes from 1 to "
                    f"{_MOST_VECTORS} of width {widths[name]}"
                )
        word = token or (metadata.get("name", "") if said in _NAMELESS else said) or file.stem
        if not word.isprintable() or any(letter.isspace() for letter in word):
            raise LoraError(f"{file}: the word of a textual inversion has no spaces, found {word!r:.60}: give another")
        return cls(file, sha256_file(file), word, found)

    def words(self, component: str) -> dict[str, Array]:
        """A word for each vector, as diffusers numbers them: `<cat>`, `<cat>_1`, …"""
        vectors = self.vectors.get(component)
        count = 0 if vectors is None else len(vectors)
        return {self.token + (f"_{i}" if i else ""): vectors[i] for i in range(count)} if vectors is not None else {}


def matrix_of(weights: Weights, component: str) -> tuple[str, tuple[int, ...]]:
    """The weight of a text encoder that has a row for each token, and its shape. Raises `LoraError`."""
    found = _matrix(weights, component)
    if found is None:
        raise LoraError(f"{component} of {weights.title} has no matrix of tokens: it takes no textual inversion")
    return found


def _matrix(weights: Weights, component: str) -> tuple[str, tuple[int, ...]] | None:
    """The same, None for a text encoder that is not of CLIP's kind."""
    return next((each for each in weights.shapes[component].items() if each[0].endswith(MATRIX)), None)
