"""What an IP-Adapter is made of: the encoder of pictures, and the projection of what it gives to tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...bundle import Tensor
from ...bundle.wiring import ImagePrompt
from ...common.errors import CheckpointError, reason
from ...families import Pipeline
from ...families.image_prompt import EMBEDS, HIDDEN, PREFIX
from ..checkpoint import Checkpoint
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec
from ..ip_adapter import IPAdapterFile
from ..loading import load_pretrained, quiet


class ImageEncoder(torch.nn.Module):
    """A picture to its projected embedding, and to the input of the encoder's last layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.model(pixel_values, output_hidden_states=True)
        return made.image_embeds, made.hidden_states[-2]


class OfEmbedding(torch.nn.Module):
    """The projected embedding of a picture, to tokens as wide as those of the text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.model(image_embeds)
        return made


class OfStates(torch.nn.Module):
    """The hidden states of a picture, to tokens as wide as those of the text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.model(hidden_states)
        return made


def image_encoder(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`: CLIP's encoder of pictures."""
    folder = checkpoint.folder(name)
    with quiet():
        config = CLIPVisionConfig.from_pretrained(folder)
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    return ComponentSpec(
        name=name,
        source=name,
        load=lambda: ImageEncoder(load_pretrained(CLIPVisionModelWithProjection, folder)).eval(),
        hollow=lambda: ImageEncoder(hollow(CLIPVisionModelWithProjection, config)),
        inputs=(Tensor("pixel_values", "float32", ("batch_size", 3, config.image_size, config.image_size)),),
        outputs=(
            Tensor(EMBEDS, "float32", ("batch_size", config.projection_dim)),
            Tensor(HIDDEN, "float32", ("batch_size", tokens, config.hidden_size)),
        ),
        axes={"batch_size": Axis(1, 3)},
    )


def open_adapter(checkpoint: Checkpoint, wired: ImagePrompt) -> IPAdapterFile:
    """The files of an IP-Adapter of the checkpoint."""
    encoder = checkpoint.folder(wired.encoder) if wired.encoder else None
    return IPAdapterFile.open(checkpoint.folder(wired.component), encoder)


def projection(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`: tokens of what an image encoder gives."""
    wired = next(each for each in pipeline.wiring.image_prompts.values() if each.component == name)
    file = open_adapter(checkpoint, wired)
    adapter = file.describe(wired.encoder)
    shape: tuple[str | int, ...] = ("batch_size", adapter.width)
    if adapter.reads != EMBEDS:
        config = checkpoint.config(wired.encoder)
        shape = ("batch_size", (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1, adapter.width)

    def load() -> Any:
        kind = OfEmbedding if adapter.reads == EMBEDS else OfStates
        state = {key: tensor.float() for key, tensor in file.state()["image_proj"].items()}
        loader: Any = UNet2DConditionLoadersMixin
        try:
            made = loader._convert_ip_adapter_image_proj_to_diffusers(None, state, low_cpu_mem_usage=False)
        except Exception as error:  # whatever the loader raises for weights that do not fit together
            raise CheckpointError(
                f"the projection of the IP-Adapter {name.removeprefix(PREFIX)} is damaged ({reason(error):.200}): "
                "download its file again"
            ) from None
        return kind(made.float()).eval().requires_grad_(False)

    return ComponentSpec(
        name=name,
        source=name,
        load=load,
        hollow=lambda: load().to("meta"),
        inputs=(Tensor(adapter.reads, "float32", shape),),
        outputs=(Tensor("tokens", "float32", ("batch_size", adapter.tokens, adapter.text_width)),),
        axes={"batch_size": Axis(1, 3)},
    )
