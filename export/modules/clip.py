"""CLIP text encoders: token ids to the hidden states that a U-Net reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
    """The last hidden state, then the same with 1, 2, … of the last layers skipped and the final norm applied."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.norm = _final_norm(model)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(input_ids, output_hidden_states=True)
        earlier = result.hidden_states[-2:0:-1]
        return result.last_hidden_state, *(self.norm(hidden) for hidden in earlier)


class HiddenStates(torch.nn.Module):
    """The pooled embedding where the model projects one, the last hidden state, and the input of each layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(input_ids, output_hidden_states=True)
        pooled = (result.text_embeds,) if "text_embeds" in result else ()
        return *pooled, result.last_hidden_state, *result.hidden_states[:-1]


def _final_norm(model: Any) -> Any:
    return getattr(model, "text_model", model).final_layer_norm


def text_encoder(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The encoder `name`, with the outputs that the wiring reads. The names are those of optimum's export."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = text_config(checkpoint, name)
    encoder = next(each for each in pipeline.wiring.text if each.component == name)
    wrapper: type[torch.nn.Module]
    if encoder.hidden == _LAST:
        wrapper, names = TextEncoder, [_LAST, *encoder.skips]
    else:
        wrapper, names = HiddenStates, [_LAST, *(f"hidden_states.{i}" for i in range(int(config.num_hidden_layers)))]
    names = [*filter(None, [encoder.pooled]), *names]
    kind = CLIPTextModelWithProjection if encoder.pooled else CLIPTextModel
    if getattr(config, "use_attention_mask", False):
        raise CheckpointError(f"the {name} is told which tokens are padding (use_attention_mask): not supported")
    window = int(config.max_position_embeddings)
    width = ("batch_size", "sequence_length", int(config.hidden_size))
    pooled = ("batch_size", int(config.projection_dim))
    return ComponentSpec(
        name=name,
        source=name,
        load=lambda: wrapper(load_pretrained(kind, checkpoint.folder(name))).eval(),
        hollow=lambda: wrapper(hollow(kind, config)),
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
