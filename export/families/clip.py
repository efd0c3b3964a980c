"""CLIP text encoders: token ids to the hidden states that a U-Net reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...bundle import Prompt, Tensor
from ...common.errors import CheckpointError
from ..checkpoint import Checkpoint
from ..configs import text_config
from ..fit import hollow
from ..loading import load_pretrained, load_tokenizer
from ..plan import Axis, ComponentPlan


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


def layers_of(checkpoint: Checkpoint, name: str) -> int:
    """How many layers the text encoder `name` has."""
    return int(text_config(checkpoint, name).num_hidden_layers)


def text_encoder(checkpoint: Checkpoint) -> ComponentPlan:
    """The encoder of Stable Diffusion 1 and 2; see `TextEncoder`."""
    from transformers import CLIPTextModel

    layers = layers_of(checkpoint, "text_encoder")
    names = ["last_hidden_state", *(f"clip_skip.{i}" for i in range(1, layers))]
    return _plan(checkpoint, "text_encoder", TextEncoder, CLIPTextModel, names)


def hidden_states(checkpoint: Checkpoint, name: str) -> ComponentPlan:
    """An encoder of Stable Diffusion XL; see `HiddenStates`. The names are those of optimum's export."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    names = ["last_hidden_state", *(f"hidden_states.{i}" for i in range(layers_of(checkpoint, name)))]
    if name == "text_encoder":
        return _plan(checkpoint, name, HiddenStates, CLIPTextModel, names)
    return _plan(checkpoint, name, HiddenStates, CLIPTextModelWithProjection, ["text_embeds", *names])


def _plan(checkpoint: Checkpoint, name: str, wrapper: type[torch.nn.Module], kind: Any, names: list[str]) -> Any:
    config = text_config(checkpoint, name)
    if getattr(config, "use_attention_mask", False):
        raise CheckpointError(f"the {name} is told which tokens are padding (use_attention_mask): not supported")
    window = int(config.max_position_embeddings)
    width = ("batch_size", "sequence_length", int(config.hidden_size))
    pooled = ("batch_size", int(config.projection_dim))
    return ComponentPlan(
        name=name,
        source=name,
        load=lambda: wrapper(load_pretrained(kind, checkpoint.folder(name))).eval(),
        hollow=lambda: wrapper(hollow(kind, config)),
        inputs=(Tensor("input_ids", "int64", ("batch_size", "sequence_length")),),
        outputs=tuple(Tensor(each, "float32", pooled if each == "text_embeds" else width) for each in names),
        axes={"batch_size": Axis(1, 3), "sequence_length": Axis(min(window, 8), window)},
        integers={"input_ids": int(config.vocab_size)},
    )


def tokenizer(checkpoint: Checkpoint, encoder: str, folder: Path) -> Prompt:
    """Write the tokenizer of the encoder `text_encoder` or `text_encoder_2` below `folder`; how it is used.

    Raises `CheckpointError` when the two do not belong together.
    """
    name = encoder.replace("text_encoder", "tokenizer")
    config = text_config(checkpoint, encoder)
    limits = int(config.max_position_embeddings), int(config.vocab_size)
    if limits[0] < 1:
        raise CheckpointError(f"{encoder} has no positions: its config.json is damaged, download it again")
    return load_tokenizer(checkpoint.folder(name), folder / name, *limits)
