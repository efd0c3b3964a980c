"""Qwen3 language models as text encoders: token ids to hidden states."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ...bundle import Tensor, Tokenizer
from ...bundle.wiring import MOST_TOKENS
from ...common.errors import CheckpointError
from ...families import Pipeline
from ..checkpoint import Checkpoint
from ..configs import text_config
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec
from ..loading import load_chat_tokenizer, load_mapped

_FULL = "full_attention"
_FEW = 3
"""The layers of a twin, of which the last one is not read."""


class TextEncoder(torch.nn.Module):
    """What the last layer reads. A token sees those before it alone, so that padding at the end changes nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        made = self.model(
            input_ids,
            attention_mask={_FULL: None},  # the masks of each kind of layer; none is that of what came before
            output_hidden_states=True,
            use_cache=False,
        )
        hidden: torch.Tensor = made.hidden_states[-2]
        return hidden


def _load(folder: Path, config: Any) -> Any:
    def complete(model: Any) -> None:
        model.rotary_emb = Qwen3RotaryEmbedding(config)

    return load_mapped(Qwen3Model, folder, config, complete=complete)


def text_encoder(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The encoder `name`."""
    config, folder = text_config(checkpoint, name), checkpoint.folder(name)
    count = int(config.num_hidden_layers)
    if set(config.layer_types) != {_FULL}:
        raise CheckpointError(
            f"{folder}/config.json names layers of attention other than {_FULL} (layer_types), which are not supported"
        )
    few = min(_FEW, count)

    def twin() -> ComponentSpec:
        smaller = copy.deepcopy(config)
        smaller.num_hidden_layers, smaller.layer_types = few, config.layer_types[:few]
        return replace(spec, load=lambda: TextEncoder(_load(folder, smaller)).eval(), twin=None)

    spec = ComponentSpec(
        name=name,
        source=name,
        twin=twin,
        about_twin=f"{few} of {count} layers",
        load=lambda: TextEncoder(_load(folder, config)).eval(),
        hollow=lambda: TextEncoder(hollow(Qwen3Model, config)),
        inputs=(Tensor("input_ids", "int64", ("batch_size", "sequence_length")),),
        outputs=(Tensor("hidden_state", "float32", ("batch_size", "sequence_length", int(config.hidden_size))),),
        axes={"batch_size": Axis(1, 3), "sequence_length": Axis(8, 77)},
        integers={"input_ids": int(config.vocab_size)},
    )
    return spec


def tokenizer(checkpoint: Checkpoint, encoder: str, name: str, folder: Path) -> Tokenizer:
    """Write the tokenizer `name` of the text encoder `encoder` below `folder`; how it is used."""
    config = text_config(checkpoint, encoder)
    window = min(MOST_TOKENS, int(config.max_position_embeddings))
    return load_chat_tokenizer(checkpoint.folder(name), folder / name, window, int(config.vocab_size))
