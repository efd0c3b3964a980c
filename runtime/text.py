"""Prompts to what the U-Net reads of them: one text encoder or two, weights, long prompts, skipped layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..bundle import Bundle, Prompt
from ..common.arrays import Array
from ..common.errors import BundleError, RequestError
from ..engines import Engine
from .tokenizer import PromptTokenizer
from .weighting import pad_to_longest, weighted_embeddings


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt: `texts` for the first and the second text encoder. skip: layers to leave out."""

    texts: tuple[str, str]
    skip: int = 0
    weights: bool = False
    windows: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """hidden: float32 (tokens, width). pooled: (width,) where the U-Net takes it. cut: what did not fit, by encoder."""

    hidden: Array
    pooled: Array | None
    cut: tuple[str, ...] = ()

    def zeros(self) -> Embedding:
        """Nothing at all, of the same shape."""
        return Embedding(np.zeros_like(self.hidden), None if self.pooled is None else np.zeros_like(self.pooled))


class TextEncoders:
    """The text encoders of a bundle and their tokenizers."""

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine]) -> None:
        self._bundle, self._engine = bundle, engine
        self._prompts = bundle.manifest.prompts
        self._tokenizers: dict[str, PromptTokenizer] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Their components, in the order in which their hidden states are joined."""
        return tuple(self._prompts)

    @property
    def pooled(self) -> bool:
        """Whether one of them gives a pooled embedding."""
        return any(prompt.pooled for prompt in self._prompts.values())

    def check(self, ask: Ask) -> None:
        """Raise `RequestError` for more layers skipped than there are."""
        for name, prompt in self._prompts.items():
            if ask.skip > len(prompt.skips):
                raise RequestError(
                    f"clip_skip must be from 0 to {len(prompt.skips)} with this {name}, found {ask.skip}"
                    + ("" if prompt.skips else ": compile the checkpoint again to skip layers")
                )

    def embed(self, asks: Sequence[Ask]) -> list[Embedding]:
        """The embeddings of each prompt; plain ones go through each encoder in one call."""
        parts = [self._encode(name, asks) for name in self._prompts]
        result = []
        for embeddings in zip(*parts, strict=True):
            lengths = {len(part.hidden) for part in embeddings}
            if len(lengths) > 1:
                raise RequestError(
                    f"the prompts for the two text encoders take {' and '.join(map(str, sorted(lengths)))} tokens: "
                    "make them of one length, or leave prompt_2 out"
                )
            pooled = [part.pooled for part in embeddings if part.pooled is not None]
            hidden = [part.hidden for part in embeddings]
            cut = tuple(part.cut[0] for part in embeddings)
            result.append(Embedding(np.concatenate(hidden, axis=-1), pooled[0] if pooled else None, cut))
        return result

    def level(self, embeddings: Sequence[Embedding]) -> list[Embedding]:
        """The same, brought to one length with windows of the empty prompt."""
        if len({len(each.hidden) for each in embeddings}) == 1:
            return list(embeddings)
        empty = self.embed([Ask(("", ""))])[0].hidden
        padded = pad_to_longest([each.hidden for each in embeddings], empty)
        return [Embedding(hidden, each.pooled, each.cut) for hidden, each in zip(padded, embeddings, strict=True)]

    def _encode(self, name: str, asks: Sequence[Ask]) -> list[Embedding]:
        place = int(name.endswith("_2"))  # the refiner has the second encoder alone
        prompt, tokenizer = self._prompts[name], self.tokenizer(name)
        plain = list(dict.fromkeys(ask.texts[place] for ask in asks if not (ask.weights or ask.windows)))
        outputs: dict[str, Array] = {}
        cut: list[str] = []
        if plain:
            ids, cut = tokenizer.encode(plain)
            outputs = self._run(name, ids)
        result = []
        for ask in asks:
            text = ask.texts[place]
            if ask.weights or ask.windows:

                def run(ids: Array, skip: int = ask.skip) -> tuple[Array, Array | None]:
                    made = self._run(name, ids)
                    return made[_hidden(prompt, skip)], made.get(prompt.pooled)

                made = weighted_embeddings(text, tokenizer, run, weights=ask.weights, windows=ask.windows)
                result.append(Embedding(made.hidden, made.pooled, (made.cut,)))
            else:
                row = plain.index(text)
                pooled = outputs[prompt.pooled][row] if prompt.pooled else None
                result.append(Embedding(outputs[_hidden(prompt, ask.skip)][row], pooled, (cut[row],)))
        return result

    def _run(self, name: str, ids: Array) -> dict[str, Array]:
        """The outputs of one call, those that the manifest names at least. Raises `BundleError` when one is missing."""
        engine = self._engine(name)
        spec = engine.inputs[0]
        output = engine({spec.name: ids.astype(spec.dtype)})
        prompt = self._prompts[name]
        if self._bundle.foreign and prompt.hidden not in output:
            output = {**output, prompt.hidden: output[engine.outputs[0].name]}
        for wanted in (prompt.hidden, *prompt.skips, *filter(None, (prompt.pooled,))):
            if wanted not in output or (wanted != prompt.pooled and output[wanted].ndim != 3):
                raise BundleError(f"{name}: the model has no output {wanted!r}: compile the bundle again")
        return output

    def tokenizer(self, name: str) -> PromptTokenizer:
        """The tokenizer of the encoder `name`, loaded on first use."""
        if name not in self._tokenizers:  # two threads may both load it: the first one is kept
            prompt = self._prompts[name]
            self._tokenizers.setdefault(name, PromptTokenizer(self._bundle.path(prompt.tokenizer), prompt))
        return self._tokenizers[name]


def _hidden(prompt: Prompt, skip: int) -> str:
    return prompt.skips[skip - 1] if skip else prompt.hidden
