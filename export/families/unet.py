"""The conditional U-Net of the Stable Diffusion family, with whichever inputs its configuration asks for."""

from __future__ import annotations

from typing import Any

import torch

from ...bundle import Tensor
from ...bundle.pipelines import default_side
from ...common.errors import CheckpointError
from ..checkpoint import Checkpoint
from ..configs import text_config, unet_config
from ..fit import hollow, multiple_of
from ..guard import guarded
from ..loading import load_pretrained
from ..plan import Axis, ComponentPlan

INPAINT_CHANNELS = 9
"""4 of the latents, the mask, and 4 of the masked image."""
_UPSAMPLERS_OF_ANY_SIZE = 40
"""2^40 divides no latent size, so the U-Net is traced with its upsamplers told the size to reach: any size runs."""


class UNet(torch.nn.Module):
    """One denoising prediction."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.num_upsamplers = _UPSAMPLERS_OF_ANY_SIZE

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        result: torch.Tensor = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return result


def unet(checkpoint: Checkpoint, *, pooled: int = 0) -> ComponentPlan:
    """`unet`. pooled: the width of `text_embeds`, for a model that takes them and the sizes of the picture.

    Raises `CheckpointError` for inputs that this family does not know.
    """
    from diffusers import UNet2DConditionModel

    config = unet_config(checkpoint)
    _check(config, pooled)
    window = int(text_config(checkpoint, _any_encoder(checkpoint)).max_position_embeddings)
    inputs = [
        Tensor("sample", "float32", ("batch_size", config["in_channels"], "height", "width")),
        Tensor("timestep", "float32", ("batch_size",)),
        Tensor("encoder_hidden_states", "float32", ("batch_size", "sequence_length", config["cross_attention_dim"])),
    ]
    if pooled:
        inputs += [
            Tensor("text_embeds", "float32", ("batch_size", pooled)),
            Tensor("time_ids", "float32", ("batch_size", _time_ids(config, pooled))),
        ]
    if config.get("time_cond_proj_dim") is not None:
        inputs.append(Tensor("timestep_cond", "float32", ("batch_size", int(config["time_cond_proj_dim"]))))

    def without_weights() -> Any:
        return UNet(hollow(UNet2DConditionModel, checkpoint.config("unet")))

    largest = 2 ** (len(config["block_out_channels"]) - 1)
    with guarded("the unet cannot be built from its configuration"):
        unit = multiple_of(without_weights(), {each.name: each.shape for each in inputs}, largest)
    return ComponentPlan(
        name="unet",
        source="unet",
        load=lambda: UNet(load_pretrained(UNet2DConditionModel, checkpoint.folder("unet"))).eval(),
        hollow=without_weights,
        inputs=tuple(inputs),
        outputs=(Tensor("out_sample", "float32", ("batch_size", config["out_channels"], "height", "width")),),
        axes={
            "batch_size": Axis(1, 3),
            "height": Axis(8, 20, unit),
            "width": Axis(8, 20, unit),
            "sequence_length": Axis(min(window, 8), window),
        },
        scale={"timestep": 999.0, "time_ids": 1024.0},
        repeat="timestep",
    )


def inpaints(checkpoint: Checkpoint) -> bool:
    """Whether the U-Net sees the mask and the masked image, and so can do nothing but inpaint."""
    return unet_config(checkpoint)["in_channels"] == INPAINT_CHANNELS


def default_size(checkpoint: Checkpoint, downscale: int, family: str) -> tuple[int, int]:
    """Width and height that the pipelines of `family` draw by default, in pixels."""
    raw = checkpoint.config("unet")
    side = raw.get("sample_size")
    if not isinstance(side, int):
        raise CheckpointError("the U-Net configuration has no integer sample_size: add it to unet/config.json")
    side = default_side(family, side, raw.get("_diffusers_version")) * downscale
    return side, side


def _any_encoder(checkpoint: Checkpoint) -> str:
    return "text_encoder" if checkpoint.has("text_encoder") else "text_encoder_2"


def _time_ids(config: dict[str, Any], pooled: int) -> int:
    """How many numbers say the sizes of the picture: 6, or 5 with an aesthetic score."""
    count = (int(config["projection_class_embeddings_input_dim"]) - pooled) / int(config["addition_time_embed_dim"])
    if count not in (5, 6):
        raise CheckpointError(
            f"the U-Net takes {config['projection_class_embeddings_input_dim']} added numbers "
            f"(projection_class_embeddings_input_dim), the text encoder gives {pooled} pooled ones, which leaves "
            f"{count:g} sizes of the picture where 5 or 6 are supported: give parts of one checkpoint "
            "(--component text_encoder_2=FOLDER or --component unet=FOLDER)"
        )
    return int(count)


def _check(config: dict[str, Any], pooled: int) -> None:
    unsupported = {
        "class_embed_type": "class embeddings",
        "encoder_hid_dim": "projected text embeddings",
        "num_class_embeds": "class embeddings",
    }
    for name, meaning in unsupported.items():
        if config.get(name) is not None:
            raise CheckpointError(f"the U-Net takes {meaning} ({name}), which is not supported")
    if config.get("dual_cross_attention"):
        raise CheckpointError("the U-Net has dual_cross_attention (text and image), which is not supported")
    if config.get("addition_embed_type") != ("text_time" if pooled else None):
        raise CheckpointError(
            f"the U-Net takes the added embeddings {config.get('addition_embed_type')!r}, which this family does not: "
            "choose another --family"
        )
    if not isinstance(config.get("cross_attention_dim"), int):
        raise CheckpointError(
            f"the U-Net has cross_attention_dim {config.get('cross_attention_dim')!r}, which is not supported"
        )
    if config.get("in_channels") not in (config.get("out_channels"), INPAINT_CHANNELS):
        raise CheckpointError(
            f"the U-Net takes {config.get('in_channels')} channels (a depth or edit model), which is not supported"
        )
