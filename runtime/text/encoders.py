"""Prompts to what the U-Net reads of them: one text encoder or two, weights, long prompts, skipped layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...bundle import Bundle, TextEncoder
from ...common.arrays import Array
from ...common.errors import BundleError, RequestError
from ...engines import Engine
from .tokenizer import PromptTokenizer
from .weighting import count_windows, pad_to_longest, weighted_embeddings


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """One prompt: `texts` for the first and the second text encoder. skip: layers to leave out."""

    texts: tuple[str, str]
    skip: int = 0
    weights: bool = False
    windows: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """hidden: float32 (tokens, width). pooled: (width,) where the U-Net takes it. truncated: what did not fit, by
    encoder."""

    hidden: Array
    pooled: Array | None
    truncated: tuple[str, ...] = ()

    def zeros(self) -> Embedding:
        """Nothing at all, of the same shape."""
        return Embedding(np.zeros_like(self.hidden), None if self.pooled is None else np.zeros_like(self.pooled))

    def sources(self) -> dict[str, Array]:
        """By the sources of the wiring."""
        return {"text.hidden": self.hidden, **({} if self.pooled is None else {"text.pooled": self.pooled})}


class TextEncoders:
    """The text encoders of a bundle and their tokenizers."""

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine]) -> None:
        self._bundle, self._engine = bundle, engine
        self._encoders = {encoder.component: encoder for encoder in bundle.manifest.wiring.text}
        self._tokenizers: dict[str, PromptTokenizer] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Their components, in the order in which their hidden states are joined."""
        return tuple(self._encoders)

    @property
    def pooled(self) -> bool:
        """Whether one of them gives a pooled embedding."""
        return any(encoder.pooled for encoder in self._encoders.values())

    def check(self, spec: PromptSpec) -> None:
        """Raise `RequestError` for more layers skipped than there are."""
        for name, encoder in self._encoders.items():
            if spec.skip > len(encoder.skips):
                raise RequestError(
                    f"clip_skip must be from 0 to {len(encoder.skips)} with this {name}, found {spec.skip}"
                    + ("" if encoder.skips else ": compile the checkpoint again to skip layers")
                )

    def tokens(self, spec: PromptSpec) -> int:
        """How many tokens the embedding of a prompt has. Raises `RequestError` where the two encoders do not agree."""
        total = joined = 0
        for name, encoder in self._encoders.items():
            tokenizer = self.tokenizer(name)
            windows = 1
            if spec.weights or spec.windows:
                text = spec.texts[encoder.text]
                windows = count_windows(text, tokenizer, weights=spec.weights, windows=spec.windows)
            tokens = windows * tokenizer.window
            if not encoder.hidden:
                continue
            if joined and encoder.join == "width" and tokens != joined:
                raise _unequal(joined, tokens)
            total += 0 if joined and encoder.join == "width" else tokens
            joined = total
        return total

    def embed(self, specs: Sequence[PromptSpec]) -> list[Embedding]:
        """The embeddings of each prompt; plain ones go through each encoder in one call."""
        parts = [self._encode(name, specs) for name in self._encoders]
        return [_joined(list(self._encoders.values()), embeddings) for embeddings in zip(*parts, strict=True)]

    def level(self, embeddings: Sequence[Embedding]) -> list[Embedding]:
        """The same, brought to one length with windows of the empty prompt."""
        if len({len(each.hidden) for each in embeddings}) == 1:
            return list(embeddings)
        empty = self.embed([PromptSpec(("", ""))])[0].hidden
        padded = pad_to_longest([each.hidden for each in embeddings], empty)
        return [Embedding(hidden, each.pooled, each.truncated) for hidden, each in zip(padded, embeddings, strict=True)]

    def _encode(self, name: str, specs: Sequence[PromptSpec]) -> list[Embedding]:
        encoder, tokenizer = self._encoders[name], self.tokenizer(name)
        plain = list(dict.fromkeys(spec.texts[encoder.text] for spec in specs if not (spec.weights or spec.windows)))
        outputs: dict[str, Array] = {}
        truncated: list[str] = []
        if plain:
            ids, truncated = tokenizer.encode(plain)
            outputs = self._run(name, ids)
        result = []
        for spec in specs:
            text = spec.texts[encoder.text]
            if spec.weights or spec.windows:

                def run(ids: Array, skip: int = spec.skip) -> tuple[Array, Array | None]:
                    made = self._run(name, ids)
                    return made[_hidden(encoder, skip)], made.get(encoder.pooled)

                made = weighted_embeddings(text, tokenizer, run, weights=spec.weights, windows=spec.windows)
                result.append(Embedding(made.hidden, made.pooled, (made.truncated,)))
            else:
                row = plain.index(text)
                pooled = outputs[encoder.pooled][row] if encoder.pooled else None
                result.append(Embedding(outputs[_hidden(encoder, spec.skip)][row], pooled, (truncated[row],)))
        return result

    def _run(self, name: str, ids: Array) -> dict[str, Array]:
        """The outputs of one call, those that the manifest names at least. Raises `BundleError` when one is missing."""
        engine = self._engine(name)
        spec = engine.inputs[0]
        output = engine({spec.name: ids.astype(spec.dtype)})
        encoder = self._encoders[name]
        if self._bundle.foreign and encoder.hidden not in output:
            output = {**output, encoder.hidden: output[engine.outputs[0].name]}
        for wanted in filter(None, (encoder.hidden, *encoder.skips, encoder.pooled)):
            if wanted not in output or (wanted != encoder.pooled and output[wanted].ndim != 3):
                raise BundleError(f"{name}: the model has no output {wanted!r}: compile the bundle again")
        return output

    def tokenizer(self, name: str) -> PromptTokenizer:
        """The tokenizer of the encoder `name`, loaded on first use."""
        if name not in self._tokenizers:  # two threads may both load it: the first one is kept
            folder = self._encoders[name].tokenizer
            spec = self._bundle.manifest.tokenizers[folder]
            self._tokenizers.setdefault(name, PromptTokenizer(self._bundle.path(folder), spec))
        return self._tokenizers[name]


def _joined(encoders: Sequence[TextEncoder], embeddings: Sequence[Embedding]) -> Embedding:
    """What the denoiser reads of one prompt; see `TextEncoder.join`. Raises `RequestError` for unequal lengths."""
    hidden: Array | None = None
    for encoder, each in zip(encoders, embeddings, strict=True):
        if not encoder.hidden:
            continue
        if hidden is None:
            hidden = each.hidden
        elif encoder.join == "sequence":
            width = max(hidden.shape[1], each.hidden.shape[1])
            hidden = np.concatenate(
                [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (hidden, each.hidden)]
            )
        elif len(hidden) == len(each.hidden):
            hidden = np.concatenate([hidden, each.hidden], axis=1)
        else:
            raise _unequal(len(hidden), len(each.hidden))
    if hidden is None:
        raise BundleError("no text encoder gives hidden states: compile the bundle again")
    pooled = [part.pooled for part in embeddings if part.pooled is not None]
    return Embedding(
        hidden, np.concatenate(pooled) if pooled else None, tuple(part.truncated[0] for part in embeddings)
    )


def _unequal(first: int, second: int) -> RequestError:
    return RequestError(
        f"the prompts for the two text encoders take {first} and {second} tokens: "
        "make them of one length, or leave prompt_2 out"
    )


def _hidden(encoder: TextEncoder, skip: int) -> str:
    return encoder.skips[skip - 1] if skip else encoder.hidden
