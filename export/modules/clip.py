"""CLIP text encoders: token ids to the hidden states that a U-Net reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ...bundle import Tensor, Tokenizer
from ...common.errors import CheckpointError
from ...families import Pipeline
from ..checkpoint import Checkpoint
from ..configs import text_config
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec
from ..loading import load_pretrained, load_tokenizer

_LAST = "last_hidden_state"


class TextEncoder(torch.nn.Module):
    """The pooled embedding where one is read, the last hidden state, and earlier ones.

    pooled: its name in what the model gives, "" for none. skips: the earlier ones are those with 1, 2, … of the last
    layers skipped and the final norm applied; else they are the input of each layer.
    """

    def __init__(self, model: Any, skips: bool, pooled: str) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled
        self.norm = getattr(model, "text_model", model).final_layer_norm if skips else None

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(input_ids, output_hidden_states=True)
        pooled = (result[self.pooled],) if self.pooled else ()
        states = result.hidden_states
        earlier = states[:-1] if self.norm is None else map(self.norm, states[-2:0:-1])
        return *pooled, result.last_hidden_state, *earlier


def text_encoder(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The encoder `name`, with the outputs that the wiring reads. The names are those of optimum's export."""
    config = text_config(checkpoint, name)
    encoder = next(each for each in pipeline.wiring.text if each.component == name)
    skips = encoder.hidden == _LAST
    projects = encoder.pooled == "text_embeds"
    earlier = encoder.skips if skips else [f"hidden_states.{i}" for i in range(int(config.num_hidden_layers))]
    names = [*filter(None, [encoder.pooled]), _LAST, *earlier]
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    if getattr(config, "use_attention_mask", False):
        raise CheckpointError(f"the {name} is told which tokens are padding (use_attention_mask): not supported")
    window = int(config.max_position_embeddings)
    width = ("batch_size", "sequence_length", int(config.hidden_size))
    pooled = ("batch_size", int(config.projection_dim if projects else config.hidden_size))
    return ComponentSpec(
        name=name,
        source=name,
        load=lambda: TextEncoder(load_pretrained(kind, checkpoint.folder(name)), skips, encoder.pooled).eval(),
        hollow=lambda: TextEncoder(hollow(kind, config), skips, encoder.pooled),
        inputs=(Tensor("input_ids", "int64", ("batch_size", "sequence_length")),),
        outputs=tuple(Tensor(each, "float32", pooled if each == encoder.pooled else width) for each in names),
        axes={"batch_size": Axis(1, 3), "sequence_length": Axis(min(window, 8), window)},
        integers={"input_ids": int(config.vocab_size)},
    )


def tokenizer(checkpoint: Checkpoint, encoder: str, name: str, folder: Path) -> Tokenizer:
    """Write the tokenizer `name` of the text encoder `encoder` below `folder`; how it is used.

    Raises `CheckpointError` when the two do not belong together.
    """
    config = text_config(checkpoint, encoder)
    limits = int(config.max_position_embeddings), int(config.vocab_size)
    if limits[0] < 1:
        raise CheckpointError(f"{encoder} has no positions: its config.json is damaged, download it again")
    return load_tokenizer(checkpoint.folder(name), folder / name, *limits)
