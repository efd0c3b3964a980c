"""What an IP-Adapter is made of: the encoder of pictures, and the projection of what it gives to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.transformer_sd3 import SD3Transformer2DLoadersMixin
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from ...bundle import Tensor
from ...bundle.wiring import ImagePrompt
from ...common.errors import CheckpointError, reason
from ...families import Pipeline
from ...families.image_prompt import EMBEDS, FLUX, HIDDEN, PREFIX, SD3, Adapter
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


class StatesOfImage(torch.nn.Module):
    """A picture to the input of the last layer of SigLIP's encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.model(pixel_values, output_hidden_states=True).hidden_states[-2]
        return made


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
    """The component `name`: CLIP's encoder of pictures, or SigLIP's."""
    folder = checkpoint.folder(name)
    if checkpoint.config(name).get("model_type", "").startswith("siglip"):
        return _siglip(folder, name)
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


def _siglip(folder: Path, name: str) -> ComponentSpec:
    with quiet():
        config = SiglipVisionConfig.from_pretrained(folder)
    patches = (config.image_size // config.patch_size) ** 2
    return ComponentSpec(
        name=name,
        source=name,
        load=lambda: StatesOfImage(load_pretrained(SiglipVisionModel, folder)).eval(),
        hollow=lambda: StatesOfImage(hollow(SiglipVisionModel, config)),
        inputs=(Tensor("pixel_values", "float32", ("batch_size", 3, config.image_size, config.image_size)),),
        outputs=(Tensor(HIDDEN, "float32", ("batch_size", patches, config.hidden_size)),),
        axes={"batch_size": Axis(1, 3)},
    )


def open_adapter(checkpoint: Checkpoint, wired: ImagePrompt) -> IPAdapterFile:
    """The files of an IP-Adapter of the checkpoint."""
    encoder = checkpoint.folder(wired.encoder) if wired.encoder else None
    return IPAdapterFile.open(checkpoint.folder(wired.component), encoder)


def projection(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`: tokens of what an image encoder gives.

    Of Stable Diffusion 3 the part of it that the timestep does not change.
    """
    wired = next(each for each in pipeline.wiring.image_prompts.values() if each.component == name)
    file = open_adapter(checkpoint, wired)
    adapter = file.describe(wired.encoder)
    shape: tuple[str | int, ...] = ("batch_size", adapter.width)
    if adapter.reads != EMBEDS:
        patches = (int(adapter.config["image_size"]) // int(adapter.config["patch_size"])) ** 2
        shape = ("batch_size", patches + (adapter.of != SD3), adapter.width)

    def load() -> Any:
        kind = OfEmbedding if adapter.reads == EMBEDS else OfStates
        made = projection_of(file, name, adapter)
        return kind(made.proj_in if adapter.of == SD3 else made).eval()

    return ComponentSpec(
        name=name,
        source=name,
        load=load,
        hollow=lambda: load().to("meta"),
        inputs=(Tensor(adapter.reads, "float32", shape),),
        outputs=(
            Tensor("tokens", "float32", ("batch_size", adapter.tokens, adapter.token_width or adapter.text_width)),
        ),
        axes={"batch_size": Axis(1, 3)},
    )


def projection_of(file: IPAdapterFile, name: str, adapter: Adapter) -> Any:
    """The projection of an adapter as diffusers has it, in float32. Raises `CheckpointError` for a damaged one."""
    state = file.state()["image_proj"]
    try:
        if adapter.of == FLUX:
            made: Any = ImageProjection(adapter.width, adapter.text_width, adapter.tokens)
            made.load_state_dict({key.replace("proj", "image_embeds"): tensor for key, tensor in state.items()})
        else:
            loader: Any = SD3Transformer2DLoadersMixin if adapter.of == SD3 else UNet2DConditionLoadersMixin
            made = loader._convert_ip_adapter_image_proj_to_diffusers(None, state, low_cpu_mem_usage=False)
    except Exception as error:  # whatever the loader raises for weights that do not fit together
        raise CheckpointError(
            f"the projection of the IP-Adapter {name.removeprefix(PREFIX)} is damaged ({reason(error):.200}): "
            "download its file again"
        ) from None
    return made.float().requires_grad_(False)
