"""The added tokens of a CLIP tokenizer folder, read off its JSON files in the order in which transformers 5 reads them.

`added_tokens_decoder` of `tokenizer_config.json` says all where it is there. Older folders have
`special_tokens_map.json`, which overrides `tokenizer_config.json`, and `added_tokens.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.errors import BundleError
from ..common.files import read_json

_NAMED = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "sep_token": None,
    "pad_token": "<|endoftext|>",
    "cls_token": None,
    "mask_token": None,
}
"""The names of special tokens, in the order in which they are added, and what CLIP's tokenizer takes by default."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A text that is one token wherever it stands in a prompt; the flags are those of the `tokenizers` library."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True, slots=True)
class ClipTokens:
    """added: in the order in which they get their ids. named: `bos_token`, `eos_token`, `unk_token` and `pad_token`."""

    added: tuple[AddedToken, ...]
    named: dict[str, str]

    def ids(self, vocabulary: Mapping[str, int]) -> dict[str, int]:
        """The id of each added token: that of the vocabulary, or else the next one after it."""
        ids: dict[str, int] = {}
        for token in self.added:
            after = max(ids.values(), default=-1) + 1
            ids.setdefault(token.content, vocabulary.get(token.content, max(after, len(vocabulary))))
        return ids


def read_tokens(folder: Path) -> ClipTokens:
    """The added tokens of the tokenizer in `folder`. Raises `BundleError` when a file is damaged."""
    config = _read(folder / "tokenizer_config.json")
    listed = config.get("added_tokens_decoder")
    try:
        if listed is not None:
            decoder = {int(token_id): _token(value) for token_id, value in listed.items()}
        else:
            for name, value in _read(folder / "special_tokens_map.json").items():
                config[name] = _token({**value, "special": True}) if isinstance(value, dict) else value
            decoder = _older(folder, config)
        return _joined(config, decoder)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(f"the special tokens of {folder} are damaged ({error}): export the model again") from None


def _joined(config: Mapping[str, Any], decoder: Mapping[int, AddedToken]) -> ClipTokens:
    """The tokens listed, by id, then the named ones and further special ones that are not listed."""
    named = _NAMED | {name: value for name, value in config.items() if name.endswith("_token")}
    chosen = {name: _token(value) for name, value in named.items() if isinstance(value, (str, dict, AddedToken))}
    contents = {token.content for token in chosen.values()}
    listed = {token.content: token for _, token in sorted(decoder.items())}
    others = dict.fromkeys((*chosen.values(), *map(_token, _further(config))))
    # of two with the same text, the flags of the later count
    added = listed | {token.content: token for token in others if token.content not in listed}
    return ClipTokens(
        added=tuple(replace(token, special=token.special or token.content in contents) for token in added.values()),
        named={name: chosen[name].content for name, default in _NAMED.items() if default and name in chosen},
    )


def _further(config: Mapping[str, Any]) -> list[Any]:
    """The special tokens that have no name."""
    values = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    return list(values.values() if isinstance(values, dict) else values)


def _older(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """What `added_tokens.json` lists, and `tokenizer.json` where it is there."""
    values = (*(config.get(name) for name in _NAMED), *_further(config))
    special = {value.content if isinstance(value, AddedToken) else str(value) for value in values}
    decoder = {}
    for content, token_id in _read(folder / "added_tokens.json").items():
        decoder[int(token_id)] = AddedToken(content, normalized=content not in special, special=content in special)
    for value in _read(folder / "tokenizer.json").get("added_tokens", ()):
        decoder[int(value["id"])] = _token(value)
    return decoder


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, f"the tokenizer's {path.name}") if path.is_file() else {}


def _token(value: Any) -> AddedToken:
    """A text is a special token; an object says its flags, and is normalized unless it is special."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value)
    if not isinstance(value.get("content"), str):
        raise ValueError(f"a token without content: {value!r:.80}")
    flags = {name: bool(value[name]) for name in _FLAGS if name in value}
    special = flags.setdefault("special", False)
    return AddedToken(value["content"], **{"normalized": not special, **flags})
