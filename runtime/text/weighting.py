"""Embeddings of weighted prompts, and of prompts longer than one window, from encoders that read token ids alone.

The arithmetic is that of compel (github.com/damian0815/compel) with `DownweightMode.REMOVE`, its variant that needs no
attention mask. Each window of a long prompt is weighted on its own: a fragment that is weighted down is taken out of
its window, and nothing moves between windows.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .prompt_syntax import Fragment, Prompt, parse
from .tokenizer import PromptTokenizer

Run = Callable[[Array], tuple[Array, Array | None]]
"""Token ids, int64 (n, max_length), to hidden states, (n, max_length, width), and pooled ones, (n, p), or None."""

_SMALLEST_WEIGHT = 1e-5  # at 0 the tangent below would be infinite
_SENTENCE_ENDS = frozenset({".</w>"})
_PHRASE_ENDS = _SENTENCE_ENDS | {",</w>", ";</w>", ":</w>"}
_WORD_END = "</w>"


@dataclass(frozen=True, slots=True)
class Embedding:
    """One prompt, encoded: hidden (k * max_length, width) for k windows, pooled (p,) or None, what was truncated.

    tokens: how many of the hidden states, from the first, stand for the prompt; None for all.
    """

    hidden: Array
    pooled: Array | None = None
    truncated: str = ""
    tokens: int | None = None

    def zeros(self) -> Embedding:
        """Nothing at all, of the same shape."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return Embedding(np.zeros_like(self.hidden), pooled, tokens=self.tokens)

    def longer(self, length: int) -> Embedding:
        """The same, filled with zeros to so many hidden states, which stand for nothing."""
        more = length - len(self.hidden)
        tokens = len(self.hidden) if self.tokens is None else self.tokens
        return replace(self, hidden=np.pad(self.hidden, ((0, more), (0, 0))), tokens=tokens)

    def sources(self) -> dict[str, Array]:
        """By the sources of the wiring."""
        count = len(self.hidden)
        mask = (np.arange(count) < (count if self.tokens is None else self.tokens)).astype(np.float32)
        pooled = {} if self.pooled is None else {"text.pooled": self.pooled}
        return {"text.hidden": self.hidden, "text.mask": mask, **pooled}


@dataclass(frozen=True, slots=True)
class _Token:
    id: int
    weight: float
    fragment: int


_Ids = tuple[int, ...]
_Tokens = tuple[_Token, ...]


def weighted_embeddings(
    text: str, tokenizer: PromptTokenizer, run: Run, *, weights: bool = True, windows: bool = True
) -> Embedding:
    """Encode one prompt with one call of `run`, to which each different row is given once.

    weights: read the syntax of `prompt_syntax`; without it the text is taken literally.
    windows: split a long prompt into windows, after the last full stop that fits, else after another stop, after a word
    or anywhere; without it all but the first `tokenizer.room` tokens of each part are cut off, as diffusers does.
    `pooled` is that of the text cut to one window; of all the weights only a blend's act on it.
    A prompt of one window without weights is, bit for bit, what `run` makes of `tokenizer.encode`.
    Raises `RequestError` for syntax that `parse` refuses, and for `.and()` where `windows` is False.
    """
    prompt, tokens, parts = _windows(text, tokenizer, weights=weights, windows=windows)
    room = tokenizer.room
    truncated = [] if windows else [tokenizer.text(_ids(part[room:])) for part in tokens]
    summaries = [_ids(part[:room]) for part in ([tuple(chain(*tokens))] if prompt.joined else tokens)]
    variants = [[_variants(window) for window in part] for part in parts]
    is_plain = not prompt.joined and len(parts) == 1 and all(token.weight == 1 for token in tokens[0])
    wanted = [_ids(part) for _, part in chain(*chain(*variants))] + summaries + ([] if is_plain else [()])
    rows = list(dict.fromkeys(wanted))
    hidden, pooled = run(np.array([tokenizer.row(row) for row in rows], np.int64))
    # float16 is too coarse for the differences that weights scale
    wide = hidden.astype(np.promote_types(hidden.dtype, np.float32), copy=False)
    states = dict(zip(rows, wide, strict=True))
    empty = states.get((), wide[0])  # of a plain prompt, where it changes nothing
    embedded = [np.concatenate([_weighted(window, states, empty) for window in part]) for part in variants]
    if prompt.joined:
        whole = np.concatenate([_scaled(*each, empty) for each in zip(embedded, prompt.weights, strict=True)])
    else:
        whole = _sum(pad_to_longest(embedded, empty), prompt.weights)
    of_summaries = (1.0,) if prompt.joined else prompt.weights
    summary = None if pooled is None else _sum([pooled[rows.index(ids)] for ids in summaries], of_summaries)
    return Embedding(whole.astype(hidden.dtype, copy=False), summary, " ".join(filter(None, truncated)))


def count_windows(text: str, tokenizer: PromptTokenizer, *, weights: bool = True, windows: bool = True) -> int:
    """How many windows `weighted_embeddings` gives for a prompt, and the same errors, without an encoder."""
    prompt, _, parts = _windows(text, tokenizer, weights=weights, windows=windows)
    counts = [len(part) for part in parts]
    return sum(counts) if prompt.joined else max(counts)


def pad_to_longest(embeddings: Sequence[Array], empty: Array) -> list[Array]:
    """Embeddings, each (k * max_length, width), made equally long by windows of `empty`, (max_length, width).

    Those of one batch, and of a prompt and its negative prompt, must be equally long. `empty` is the embedding of "".
    """
    longest = max(len(embedding) for embedding in embeddings)
    return [
        np.concatenate([embedding, *[empty] * ((longest - len(embedding)) // len(empty))]) for embedding in embeddings
    ]


def _windows(
    text: str, tokenizer: PromptTokenizer, *, weights: bool, windows: bool
) -> tuple[Prompt, list[_Tokens], list[list[_Tokens]]]:
    """The prompt, and of each part all tokens, and the windows that they are split into."""
    prompt = parse(text) if weights else Prompt(((Fragment(text, 1.0),),), (1.0,))
    if prompt.joined and not windows:
        raise RequestError("prompt: .and() makes a window of each part: allow prompts longer than one window")
    tokens = []
    for fragments in prompt.parts:
        ids = tokenizer.tokens([fragment.text for fragment in fragments])
        tokens.append(tuple(_Token(token, f.weight, i) for i, f in enumerate(fragments) for token in ids[i]))
    return prompt, tokens, [_split(part, tokenizer) if windows else [part[: tokenizer.room]] for part in tokens]


def _ids(tokens: Iterable[_Token]) -> _Ids:
    return tuple(token.id for token in tokens)


def _split(tokens: _Tokens, tokenizer: PromptTokenizer) -> list[_Tokens]:
    """At least one window, each of at most `tokenizer.room` tokens."""
    pieces = tokenizer.pieces(_ids(tokens))
    windows, start = [], 0
    while len(tokens) - start > tokenizer.room:
        end = start + _best_split(pieces[start : start + tokenizer.room])
        windows.append(tokens[start:end])
        start = end
    return [*windows, tokens[start:]]


def _best_split(pieces: Sequence[str]) -> int:
    """How many of these tokens go into a window that more follow, as compel's `SplitLongTextMode.SENTENCES`."""
    sentences = [count for count, piece in enumerate(pieces, 1) if piece in _SENTENCE_ENDS]
    phrases = [count for count, piece in enumerate(pieces, 1) if piece in _PHRASE_ENDS]
    words = [count for count, piece in enumerate(pieces, 1) if piece.endswith(_WORD_END)]
    return (sentences or phrases or words or [len(pieces)])[-1]


def _variants(window: _Tokens) -> list[tuple[float, _Tokens]]:
    """The window, and the window without each fragment of a weight below 1; before each, how much it counts.

    That without a fragment of weight w counts tan((1 - w) π / 2) against 1 of the whole one: as much at w = 0.5.
    """
    lowered = {token.fragment: max(token.weight, _SMALLEST_WEIGHT) for token in window if token.weight < 1}
    without = [
        (math.tan((1 - weight) * math.pi / 2), tuple(token for token in window if token.fragment != fragment))
        for fragment, weight in lowered.items()
    ]
    return [(1.0, window), *without]


def _weighted(variants: Sequence[tuple[float, _Tokens]], states: dict[_Ids, Array], empty: Array) -> Array:
    """One window's hidden states: the mean of its variants, each scaled by token."""
    counts, scaled = [count for count, _ in variants], []
    for _, tokens in variants:
        weights = np.ones((len(empty), 1), empty.dtype)
        weights[1 : 1 + len(tokens), 0] = [token.weight for token in tokens]
        scaled.append(_scaled(states[_ids(tokens)], weights, empty))
    return _sum(scaled, counts) / sum(counts)


def _scaled(states: Array, weights: Array | float, empty: Array) -> Array:
    """Hidden states whose difference to the empty prompt's is multiplied; those of weight 1 stay as they are."""
    base = np.tile(empty, (len(states) // len(empty), 1))
    return np.where(np.equal(weights, 1), states, base + (states - base) * weights)


def _sum(values: Sequence[Array], weights: Sequence[float]) -> Array:
    return functools.reduce(operator.add, [value * weight for value, weight in zip(values, weights, strict=True)])
