"""Text encoders, by the class of each: CLIP's or T5's."""

from __future__ import annotations

from pathlib import Path

from ...bundle import Tokenizer
from ...families import Pipeline
from ..checkpoint import Checkpoint
from ..configs import is_t5
from ..graphs.spec import ComponentSpec
from . import clip, t5


def text_encoder(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The encoder `name`, with the outputs that the wiring reads."""
    return (t5 if is_t5(checkpoint, name) else clip).text_encoder(checkpoint, name, pipeline)


def tokenizer(checkpoint: Checkpoint, encoder: str, name: str, folder: Path) -> Tokenizer:
    """Write the tokenizer `name` of the text encoder `encoder` below `folder`; how it is used.

    Raises `CheckpointError` when the two do not belong together.
    """
    return (t5 if is_t5(checkpoint, encoder) else clip).tokenizer(checkpoint, encoder, name, folder)
