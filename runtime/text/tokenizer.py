"""Prompts to token ids, with the `tokenizers` library alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ...bundle import Tokenizer as Spec
from ...bundle.tokens import read_tokens
from ...common.arrays import Array
from ...common.errors import BundleError, LoraError
from ...common.files import check_regular

_CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class PromptTokenizer:
    """One text encoder's tokenizer: windows of tokens with start, end and padding.

    window: how many tokens one window has, start and end included. room: how many it holds between these.
    """

    def __init__(self, folder: Path, spec: Spec) -> None:
        """Raises `BundleError` when the tokenizer's files are missing or damaged."""
        self._spec = spec
        self._first = [] if spec.bos_token_id is None else [spec.bos_token_id]
        self._last = [] if spec.eos_token_id is None else [spec.eos_token_id]
        self.window, self.room = spec.max_length, spec.max_length - len(self._first) - len(self._last)
        self._tokenizer = _load(folder)
        self._after = self._tokenizer.encode(spec.after, add_special_tokens=False).ids if spec.after else []
        self._added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def with_words(self, words: Sequence[str]) -> dict[str, int]:
        """Let these be tokens of their own, each with the next id. Returns the ids.

        Raises `LoraError` for one that the vocabulary has.
        """
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        for word in words:
            if word in known:
                raise LoraError(
                    f"the word {word!r:.60} is a token already: give the textual inversion another, FILE=WORD"
                )
        self._tokenizer.add_tokens([AddedToken(word, special=False, normalized=True) for word in words])
        self._added |= set(words)
        return {word: int(self._tokenizer.token_to_id(word) or 0) for word in words}

    def encode(self, texts: Sequence[str], window: int | None = None) -> tuple[Array, list[str]]:
        """Token ids, int64 (len(texts), window), and for each text the part that did not fit ("" if all did).

        window: a shorter one than `max_length`.
        """
        return self._cut(self.tokens(texts), self.room if window is None else self.room - (self.window - window))

    def encode_in_bucket(self, texts: Sequence[str], window: int, bucket: int) -> tuple[Array, list[str], list[int]]:
        """The same, and how many tokens each text has, in a window as long as the longest, a multiple of `bucket`.

        window: what a text may have at most.
        """
        tokens, around = self.tokens(texts), len(self._first) + len(self._last)
        rows, truncated = self._cut(tokens, window - around)
        counts = [min(len(ids) + around, window) for ids in tokens]
        longest = -(-max(counts, default=0) // bucket) * bucket
        padding = ((0, 0), (0, max(0, longest - window)))
        return np.pad(rows[:, :longest], padding, constant_values=self._spec.pad_token_id), truncated, counts

    def _cut(self, tokens: Sequence[Sequence[int]], room: int) -> tuple[Array, list[str]]:
        """Windows that hold `room` tokens, and the text of those that did not fit."""
        rows = np.array([self.row(ids[:room], room) for ids in tokens], np.int64)
        return rows, [self.text(ids[room : len(ids) - len(self._after)]) for ids in tokens]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """All token ids of each text and of what it is put between, without start, end and padding.

        A token of several vectors (textual inversion) is spelt out first, as diffusers does: `<fox>` becomes
        `<fox> <fox>_1 <fox>_2` where the tokenizer has those too.
        """
        texts = [f"{self._spec.before}{text}{self._spec.after}" for text in texts]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        spelt = [self._spelt_out(text, each.tokens) for text, each in zip(texts, encodings, strict=True)]
        if spelt != texts:
            encodings = self._tokenizer.encode_batch(spelt, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _spelt_out(self, text: str, tokens: Sequence[str]) -> str:
        """`text` with every vector of each added token among its `tokens`."""
        for token in dict.fromkeys(tokens):
            if token in self._added:
                others = (f"{token}_{i}" for i in itertools.count(1))
                vectors = [token, *itertools.takewhile(self._added.__contains__, others)]
                text = text.replace(token, " ".join(vectors))
        return text

    def row(self, tokens: Sequence[int], room: int | None = None) -> list[int]:
        """The ids of a window of at most `room` tokens, by default as many as there is room for."""
        padding = [self._spec.pad_token_id] * ((self.room if room is None else room) - len(tokens))
        return [*self._first, *tokens, *self._last, *padding]

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say."""
        return self._tokenizer.decode(list(tokens)).replace("</w>", " ").strip() if tokens else ""

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it; in CLIP's, `</w>` ends a word."""
        return [self._tokenizer.id_to_token(token) or "" for token in tokens]


def _load(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            if (folder / name).exists():
                check_regular(folder / name, "the tokenizer")
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else _clip(folder)
    except BundleError:
        raise
    except Exception as error:  # the Rust side raises plain Exception
        raise BundleError(f"the tokenizer in {folder} cannot be read ({error}); compile the bundle again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _clip(folder: Path) -> Tokenizer:
    """CLIP's byte-pair encoding (Radford et al. 2021) of `vocab.json` and `merges.txt`, as transformers 5 makes it."""
    tokens = read_tokens(folder)
    model = models.BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=tokens.named["unk_token"],
        end_of_word_suffix="</w>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(**asdict(token)) for token in tokens.added])
    return tokenizer
