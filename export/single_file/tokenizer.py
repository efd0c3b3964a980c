"""CLIP's tokenizer without the hub: its merges ship with the package, and the vocabulary follows from them."""

from __future__ import annotations

import json
import lzma
from importlib.resources import files
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 49408
"""256 bytes, the same 256 at the end of a word, 48894 merges, start and end."""


def write_clip_tokenizer(folder: Path, pad_token: str, max_length: int) -> None:
    """Write the tokenizer that all Stable Diffusion checkpoints use to `folder`, as `CLIPTokenizer` saves it.

    pad_token: what fills a window, `<|endoftext|>` for CLIP-L and `!` (id 0) for OpenCLIP. max_length: tokens a window.
    """
    folder.mkdir(parents=True)
    merges = lzma.decompress((files(__package__) / "data" / "clip_merges.txt.xz").read_bytes()).decode().splitlines()
    vocabulary = {token: i for i, token in enumerate(_tokens(merges))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    for name, value in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tokens(merges: list[str]) -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())  # by code point, which is CLIP's order of the bytes too
    return [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
        START,
        END,
    ]
