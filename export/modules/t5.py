"""T5 text encoders (Raffel et al. 2020): token ids to hidden states."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import T5EncoderModel

from ...bundle import Tensor, Tokenizer
from ...families import Pipeline
from ..checkpoint import Checkpoint
from ..configs import text_config
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec
from ..loading import load_mapped, load_unigram_tokenizer

_HIDDEN = "last_hidden_state"
_LONGEST = 512
"""The tokens that pipelines read at most."""


class TextEncoder(torch.nn.Module):
    """The last hidden state. As the pipelines do, it is not told which tokens are padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids)[0]
        return hidden


def text_encoder(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The encoder `name`."""
    config, folder = text_config(checkpoint, name), checkpoint.folder(name)
    count = int(config.num_layers)
    few = min(2, count)

    def twin() -> ComponentSpec:
        smaller = copy.deepcopy(config)
        smaller.num_layers = few
        return replace(spec, load=lambda: TextEncoder(load_mapped(T5EncoderModel, folder, smaller)).eval(), twin=None)

    spec = ComponentSpec(
        name=name,
        source=name,
        twin=twin,
        about_twin=f"{few} of {count} encoder.block",
        load=lambda: TextEncoder(load_mapped(T5EncoderModel, folder, config)).eval(),
        hollow=lambda: TextEncoder(hollow(T5EncoderModel, config)),
        inputs=(Tensor("input_ids", "int64", ("batch_size", "sequence_length")),),
        outputs=(Tensor(_HIDDEN, "float32", ("batch_size", "sequence_length", int(config.d_model))),),
        axes={"batch_size": Axis(1, 3), "sequence_length": Axis(8, 77)},
        integers={"input_ids": int(config.vocab_size)},
    )
    return spec


def tokenizer(checkpoint: Checkpoint, encoder: str, name: str, folder: Path) -> Tokenizer:
    """Write the tokenizer `name` of the text encoder `encoder` below `folder`; how it is used."""
    vocabulary = int(text_config(checkpoint, encoder).vocab_size)
    return load_unigram_tokenizer(checkpoint.folder(name), folder / name, _LONGEST, vocabulary)
