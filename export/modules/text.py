"""Text encoders, by the kind of each: CLIP's, T5's or a language model's."""

from __future__ import annotations

from pathlib import Path

from ...bundle import Tokenizer
from ...families import Pipeline
from ..checkpoint import Checkpoint
from ..configs import text_kind
from ..graphs.spec import ComponentSpec
from . import clip, qwen3, t5

_KINDS = {"clip": clip, "t5": t5, "qwen3": qwen3}


def text_encoder(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The encoder `name`, with the outputs that the wiring reads."""
    return _KINDS[text_kind(checkpoint, name)].text_encoder(checkpoint, name, pipeline)


def tokenizer(checkpoint: Checkpoint, encoder: str, name: str, folder: Path) -> Tokenizer:
    """Write the tokenizer `name` of the text encoder `encoder` below `folder`; how it is used.

    Raises `CheckpointError` when the two do not belong together.
    """
    return _KINDS[text_kind(checkpoint, encoder)].tokenizer(checkpoint, encoder, name, folder)
