"""Embeddings of weighted prompts, and of prompts longer than one window, from encoders that read token ids alone.

The arithmetic is that of compel (github.com/damian0815/compel) with `DownweightMode.REMOVE`, its variant that needs no
attention mask. Each window of a long prompt is weighted on its own: a fragment that is weighted down is taken out of
its window, and nothing moves between windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .prompt_syntax import Blend, Conjunction, Fragment, Fragments, parse
from .tokenizer import PromptTokenizer

Run = Callable[[Array], tuple[Array, Array | None]]
"""Token ids, int64 (n, max_length), to hidden states, (n, max_length, width), and pooled ones, (n, p), or None."""

_SMALLEST_WEIGHT = 1e-5  # at 0 the tangent below would be infinite
_SENTENCE_ENDS = frozenset({".</w>"})
_PHRASE_ENDS = _SENTENCE_ENDS | {",</w>", ";</w>", ":</w>"}
_WORD_END = "</w>"


@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """One prompt, encoded: hidden (k * max_length, width) for k windows, pooled (p,) or None, what was truncated."""

    hidden: Array
    pooled: Array | None
    truncated: str


@dataclass(frozen=True, slots=True)
class _Token:
    id: int
    weight: float
    fragment: int


_Ids = tuple[int, ...]
_Tokens = tuple[_Token, ...]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """What the encoder made of each window, by the token ids in it: hidden (max_length, width), pooled (p,)."""

    hidden: dict[_Ids, Array]
    pooled: dict[_Ids, Array] | None
    dtype: np.dtype[Any]


def weighted_embeddings(
    text: str, tokenizer: PromptTokenizer, run: Run, *, weights: bool = True, windows: bool = True
) -> PromptEmbeddings:
    """Encode one prompt with one call of `run`, to which each different row is given once.

    weights: read the syntax of `prompt_syntax`; without it the text is taken literally.
    windows: split a long prompt into windows, after the last full stop that fits, else after another stop, after a word
    or anywhere; without it all but the first `tokenizer.room` tokens of each part are cut off, as diffusers does.
    `pooled` is that of the text cut to one window; of all the weights only a blend's act on it.
    A prompt of one window without weights is, bit for bit, what `run` makes of `tokenizer.encode`.
    Raises `RequestError` for syntax that `parse` refuses, and for `.and()` where `windows` is False.
    """
    prompt = _parsed(text, weights=weights, windows=windows)
    joined = isinstance(prompt, Conjunction)
    room = tokenizer.room
    tokens = [_tokens(part, tokenizer) for part in prompt.parts]
    truncated = [] if windows else [tokenizer.text(_ids(part[room:])) for part in tokens]
    parts = [_windows(part, tokenizer) if windows else [part[:room]] for part in tokens]
    summaries = [_ids(part[:room]) for part in ([tuple(chain(*tokens))] if joined else tokens)]
    plain = not joined and len(parts) == 1 and all(token.weight == 1 for token in tokens[0])
    wanted = [*chain(*(_rows(window) for window in chain(*parts))), *summaries, *([] if plain else [()])]
    encoded = _encode(wanted, tokenizer, run)
    states = [np.concatenate([_weighted(window, encoded.hidden) for window in part]) for part in parts]
    return PromptEmbeddings(
        hidden=_combined(prompt, states, encoded.hidden).astype(encoded.dtype, copy=False),
        pooled=_pooled(summaries, (1.0,) if joined else prompt.weights, encoded),
        truncated=" ".join(filter(None, truncated)),
    )


def count_windows(text: str, tokenizer: PromptTokenizer, *, weights: bool = True, windows: bool = True) -> int:
    """How many windows `weighted_embeddings` gives for a prompt, and the same errors, without an encoder."""
    prompt = _parsed(text, weights=weights, windows=windows)
    counts = [len(_windows(_tokens(part, tokenizer), tokenizer)) if windows else 1 for part in prompt.parts]
    return sum(counts) if isinstance(prompt, Conjunction) else max(counts)


def _parsed(text: str, *, weights: bool, windows: bool) -> Blend | Conjunction:
    prompt = parse(text) if weights else (Fragment(text, 1.0),)
    if isinstance(prompt, Conjunction) and not windows:
        raise RequestError("prompt: .and() makes a window of each part: allow prompts longer than one window")
    return Blend((prompt,), (1.0,)) if isinstance(prompt, tuple) else prompt


def pad_to_longest(embeddings: Sequence[Array], empty: Array) -> list[Array]:
    """Embeddings, each (k * max_length, width), made equally long by windows of `empty`, (max_length, width).

    Those of one batch, and of a prompt and its negative prompt, must be equally long. `empty` is the embedding of "".
    """
    longest = max(len(embedding) for embedding in embeddings)
    return [
        np.concatenate([embedding, *[empty] * ((longest - len(embedding)) // len(empty))]) for embedding in embeddings
    ]


def _tokens(fragments: Fragments, tokenizer: PromptTokenizer) -> _Tokens:
    ids = tokenizer.tokens([fragment.text for fragment in fragments])
    return tuple(
        _Token(token, fragment.weight, index) for index, fragment in enumerate(fragments) for token in ids[index]
    )


def _ids(tokens: Iterable[_Token]) -> _Ids:
    return tuple(token.id for token in tokens)


def _windows(tokens: _Tokens, tokenizer: PromptTokenizer) -> list[_Tokens]:
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
    ends: tuple[Callable[[str], bool], ...] = (
        _SENTENCE_ENDS.__contains__,
        _PHRASE_ENDS.__contains__,
        lambda piece: piece.endswith(_WORD_END),
    )
    for is_end in ends:
        for count in range(len(pieces), 0, -1):
            if is_end(pieces[count - 1]):
                return count
    return len(pieces)


def _lowered(window: _Tokens) -> dict[int, float]:
    """The fragments of a window whose weight is below 1, and that weight."""
    return {token.fragment: token.weight for token in window if token.weight < 1}


def _without(window: _Tokens, fragment: int) -> _Tokens:
    return tuple(token for token in window if token.fragment != fragment)


def _rows(window: _Tokens) -> Iterator[_Ids]:
    """The token ids that `_weighted` asks for, but for the empty window."""
    yield _ids(window)
    for fragment in _lowered(window):
        yield _ids(_without(window, fragment))


def _encode(wanted: Iterable[_Ids], tokenizer: PromptTokenizer, run: Run) -> _Encoded:
    rows = list(dict.fromkeys(wanted))
    hidden, pooled = run(np.array([tokenizer.row(row) for row in rows], np.int64))
    # float16 is too coarse for the differences that weights scale
    wide = hidden.astype(np.promote_types(hidden.dtype, np.float32), copy=False)
    return _Encoded(
        hidden=dict(zip(rows, wide, strict=True)),
        pooled=None if pooled is None else dict(zip(rows, pooled, strict=True)),
        dtype=hidden.dtype,
    )


def _weighted(window: _Tokens, hidden: dict[_Ids, Array]) -> Array:
    """One window's hidden states: scaled by token, and for each lowered fragment drawn to the window without it.

    The window without a fragment of weight w counts tan((1 - w) π / 2) against 1 of the whole one: as much at w = 0.5.
    """
    total, sum_of_pulls = _scaled_tokens(window, hidden), 1.0
    for fragment, weight in _lowered(window).items():
        pull = math.tan((1 - max(weight, _SMALLEST_WEIGHT)) * math.pi / 2)
        total = total + pull * _scaled_tokens(_without(window, fragment), hidden)
        sum_of_pulls += pull
    return total / sum_of_pulls


def _scaled_tokens(window: _Tokens, hidden: dict[_Ids, Array]) -> Array:
    states = hidden[_ids(window)]
    if all(token.weight == 1 for token in window):
        return states
    weights = np.ones((len(states), 1), states.dtype)
    weights[1 : 1 + len(window), 0] = [token.weight for token in window]
    return _scaled(states, weights, hidden[()])


def _scaled(states: Array, weights: Array | float, empty: Array) -> Array:
    """Hidden states whose difference to the empty prompt's is multiplied; those of weight 1 stay as they are."""
    base = np.tile(empty, (len(states) // len(empty), 1))
    return np.where(np.equal(weights, 1), states, base + (states - base) * weights)


def _combined(prompt: Blend | Conjunction, states: Sequence[Array], hidden: dict[_Ids, Array]) -> Array:
    if isinstance(prompt, Conjunction):
        weighted = zip(states, prompt.weights, strict=True)
        return np.concatenate([_scaled(part, weight, hidden[()]) for part, weight in weighted])
    return _sum(pad_to_longest(states, hidden[()]) if len(states) > 1 else states, prompt.weights)


def _pooled(summaries: Sequence[_Ids], weights: Sequence[float], encoded: _Encoded) -> Array | None:
    if encoded.pooled is None:
        return None
    return _sum([encoded.pooled[ids] for ids in summaries], weights)


def _sum(values: Sequence[Array], weights: Sequence[float]) -> Array:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total
