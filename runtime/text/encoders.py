"""Prompts to what the U-Net reads of them: one text encoder or two, weights, long prompts, skipped layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...bundle import Bundle, TextEncoder
from ...common.arrays import Array
from ...common.errors import BundleError, RequestError
from ...engines import Engine
from .tokenizer import PromptTokenizer
from .weighting import Embedding, count_windows, pad_to_longest, weighted_embeddings


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """One prompt: `texts` for `prompt`, `prompt_2` and `prompt_3`. skip: layers to leave out.

    length: the tokens of encoders that take windows of any length, None for as many as they take.
    """

    texts: tuple[str, ...]
    skip: int = 0
    weights: bool = False
    windows: bool = False
    length: int | None = None


class TextEncoders:
    """The text encoders of a bundle and their tokenizers."""

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine]) -> None:
        self._bundle, self._engine = bundle, engine
        wiring = bundle.manifest.wiring
        self._encoders, self._zeros = {encoder.component: encoder for encoder in wiring.text}, wiring.zeros
        inputs = bundle.component(bundle.manifest.named("denoiser")).inputs
        widths = [tensor.shape[-1] for tensor in inputs if wiring.inputs.get(tensor.name) == "text.hidden"]
        self._width = next((width for width in widths if isinstance(width, int)), 0)
        self._tokenizers: dict[str, PromptTokenizer] = {}

    def set_words(self, words: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[int, Array]]:
        """Let words be tokens with vectors of their own, and forget those of before.

        words: by text encoder, a vector for each. Returns the rows of the matrices of tokens, by text encoder.
        Raises `LoraError` for a word that is a token; the tokenizers are then as they were.
        """
        made: dict[str, PromptTokenizer] = {}
        rows: dict[str, dict[int, Array]] = {}
        for name, vectors in words.items():
            made[name] = self._new_tokenizer(name)
            ids = made[name].with_words(list(vectors))
            rows[name] = {ids[word]: vector for word, vector in vectors.items()}
        self._tokenizers.clear()
        self._tokenizers.update(made)
        return rows

    def with_engines(self, engine: Callable[[str], Engine]) -> TextEncoders:
        """The same with other engines. engine: loads a component by its name."""
        other = TextEncoders(self._bundle, engine)
        other._tokenizers = self._tokenizers
        return other

    @property
    def pooled(self) -> bool:
        """Whether one of them gives a pooled embedding."""
        return any(encoder.pooled for encoder in self._encoders.values())

    @property
    def longest(self) -> int:
        """The most tokens that a request may choose to have, 0 where it may not choose."""
        return self._bundle.manifest.longest_text

    @property
    def most(self) -> int:
        """The most hidden states that the denoiser has positions for, 0 for any number."""
        return min((each.most for each in self._encoders.values() if each.most), default=0)

    @property
    def weighted(self) -> bool:
        """Whether weights and long prompts have a meaning: where every encoder gives hidden states of windows."""
        windows = (each.hidden and each.join == "width" and not each.bucket for each in self._encoders.values())
        return not self._zeros and all(windows)

    @property
    def bucket(self) -> int:
        """What the tokens of a prompt are a multiple of, where a window is as long as its prompt; 0 where it is not."""
        return max(encoder.bucket for encoder in self._encoders.values())

    @property
    def most_skipped(self) -> int:
        """The most layers that a request may skip."""
        return min((len(each.skips) for each in self._encoders.values() if each.hidden and not each.length), default=0)

    @property
    def skippable(self) -> bool:
        """Whether layers of one of them may be skipped."""
        return any(each.hidden and not each.length for each in self._encoders.values())

    def check_skip(self, skip: int) -> None:
        """Raise `RequestError` for more layers skipped than there are."""
        for name, encoder in self._encoders.items():
            if encoder.length or not encoder.hidden:
                continue
            if skip > len(encoder.skips):
                raise RequestError(
                    f"clip_skip must be from 0 to {len(encoder.skips)} with this {name}, found {skip}"
                    + ("" if encoder.skips else ": compile the checkpoint again to skip layers")
                )

    def tokens(self, spec: PromptSpec) -> int:
        """How many tokens the embedding of a prompt has; the most, where a window is as long as its prompt.

        Raises `RequestError` where the two encoders do not agree.
        """
        total = 0
        for name, encoder in self._encoders.items():
            if not encoder.hidden:
                continue
            tokenizer, text = self.tokenizer(name), spec.texts[encoder.text]
            tokens = tokenizer.window * count_windows(text, tokenizer, weights=spec.weights, windows=spec.windows)
            if encoder.length:
                tokens = spec.length or encoder.length
            if not total or encoder.join == "sequence":
                total += tokens
            elif tokens != total:
                raise RequestError(
                    f"the prompts for the two text encoders take {total} and {tokens} tokens: "
                    "make them of one length, or leave prompt_2 out"
                )
        return total + (self._zeros if spec.length is None else spec.length) * bool(self._zeros)

    def embed(self, specs: Sequence[PromptSpec]) -> list[Embedding]:
        """The embeddings of each prompt; plain ones go through each encoder in one call, or one for each length."""
        lengths = dict.fromkeys(spec.length for spec in specs)
        if self.bucket and len(lengths) > 1:
            alike = [[spec for spec in specs if spec.length == length] for length in lengths]
            made = {spec: each for own in alike for spec, each in zip(own, self.embed(own), strict=True)}
            return [made[spec] for spec in specs]
        parts = [self._encode(name, specs) for name in self._encoders]
        joined = [_joined(list(self._encoders.values()), embeddings) for embeddings in zip(*parts, strict=True)]
        return [self._followed(each, spec) for each, spec in zip(joined, specs, strict=True)] if self._zeros else joined

    def _followed(self, embedding: Embedding, spec: PromptSpec) -> Embedding:
        """An embedding filled with zeros to the width of the denoiser, and followed by tokens of zeros."""
        tokens, width = embedding.hidden.shape
        more = self._zeros if spec.length is None else spec.length
        return replace(embedding, hidden=np.pad(embedding.hidden, ((0, more), (0, max(self._width - width, 0)))))

    def level(self, embeddings: Sequence[Embedding]) -> list[Embedding]:
        """The same, brought to one length with windows of the empty prompt, or with what stands for nothing."""
        if self.bucket:
            longest = _full(max(len(each.hidden) for each in embeddings), self.bucket)
            return [each.longer(longest) for each in embeddings]
        if len({len(each.hidden) for each in embeddings}) == 1:
            return list(embeddings)
        empty = self.embed([PromptSpec(("",) * 3)])[0].hidden
        padded = pad_to_longest([each.hidden for each in embeddings], empty)
        return [replace(each, hidden=hidden) for hidden, each in zip(padded, embeddings, strict=True)]

    def _encode(self, name: str, specs: Sequence[PromptSpec]) -> list[Embedding]:
        encoder, tokenizer = self._encoders[name], self.tokenizer(name)
        plain = list(dict.fromkeys(spec.texts[encoder.text] for spec in specs if not (spec.weights or spec.windows)))
        lengths = {spec.length or encoder.length or None for spec in specs} if encoder.length else {None}
        if len(lengths) > 1:
            raise RequestError("the prompts of a batch must have one max_sequence_length")
        counts: list[int] = []
        if encoder.bucket:
            window = next(iter(lengths)) or encoder.length
            ids, truncated, counts = tokenizer.encode_in_bucket(plain, window, encoder.bucket)
        else:
            ids, truncated = tokenizer.encode(plain, *lengths)
        outputs = self._run(name, ids) if plain else {}

        def embedding(spec: PromptSpec) -> Embedding:
            text = spec.texts[encoder.text]
            hidden = encoder.skips[spec.skip - 1] if spec.skip and encoder.skips else encoder.hidden
            if not (spec.weights or spec.windows):
                row = plain.index(text)
                pooled = outputs[encoder.pooled][row] if encoder.pooled else None
                states = outputs[hidden][row] if hidden else np.zeros((0, 0), np.float32)
                return Embedding(states, pooled, truncated[row], counts[row] if encoder.bucket else None)

            def run(ids: Array) -> tuple[Array, Array | None]:
                made = self._run(name, ids)
                return made[hidden], made.get(encoder.pooled)

            return weighted_embeddings(text, tokenizer, run, weights=spec.weights, windows=spec.windows)

        return [embedding(spec) for spec in specs]

    def _run(self, name: str, ids: Array) -> dict[str, Array]:
        """The outputs of one call, those that the manifest names at least. Raises `BundleError` when one is missing."""
        engine = self._engine(name)
        spec = engine.inputs[0]
        output = engine({spec.name: ids.astype(spec.dtype)})
        encoder = self._encoders[name]
        if self._bundle.foreign and encoder.hidden and encoder.hidden not in output:
            output = {**output, encoder.hidden: output[engine.outputs[0].name]}
        for wanted in filter(None, (encoder.hidden, *encoder.skips, encoder.pooled)):
            if wanted not in output or (wanted != encoder.pooled and output[wanted].ndim != 3):
                raise BundleError(f"{name}: the model has no output {wanted!r}: compile the bundle again")
        return output

    def tokenizer(self, name: str) -> PromptTokenizer:
        """The tokenizer of the encoder `name`, loaded on first use."""
        if name not in self._tokenizers:  # two threads may both load it: the first one is kept
            self._tokenizers.setdefault(name, self._new_tokenizer(name))
        return self._tokenizers[name]

    def _new_tokenizer(self, name: str) -> PromptTokenizer:
        folder = self._encoders[name].tokenizer
        return PromptTokenizer(self._bundle.path(folder), self._bundle.manifest.tokenizers[folder])


def _full(tokens: int, bucket: int) -> int:
    """The least multiple of `bucket` that holds so many."""
    return -(-tokens // bucket) * bucket


def _joined(encoders: Sequence[TextEncoder], embeddings: Sequence[Embedding]) -> Embedding:
    """What the denoiser reads of one prompt; see `TextEncoder.join`. Of what was truncated, the longest."""
    parts = [(encoder.join, each.hidden) for encoder, each in zip(encoders, embeddings, strict=True) if encoder.hidden]
    if not parts:
        raise BundleError("no text encoder gives hidden states: compile the bundle again")
    hidden = parts[0][1]
    for join, other in parts[1:]:
        if join == "sequence":
            width = max(hidden.shape[1], other.shape[1])
            hidden = np.concatenate([np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in (hidden, other)])
        else:
            hidden = np.concatenate([hidden, other], axis=1)
    pooled = [part.pooled for part in embeddings if part.pooled is not None]
    truncated = max((part.truncated for part in embeddings), key=len)
    tokens = embeddings[0].tokens if len(embeddings) == 1 else None
    return Embedding(hidden, np.concatenate(pooled) if pooled else None, truncated, tokens)
