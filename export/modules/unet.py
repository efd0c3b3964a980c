"""The conditional U-Net of the Stable Diffusion family, with whichever inputs its configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ...bundle import Tensor
from ...common.errors import CheckpointError
from ...families import Pipeline
from ..checkpoint import Checkpoint
from ..configs import text_config, unet_config
from ..fit import hollow, multiple_of
from ..graphs.spec import Axis, ComponentSpec
from ..guard import guarded
from ..loading import load_pretrained

_UPSAMPLERS_OF_ANY_SIZE = 40
"""2^40 divides no latent size, so the U-Net is traced with upsamplers that are given the size to reach: any runs."""


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


def unet(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`. Raises `CheckpointError` for inputs that no family knows."""
    config = unet_config(checkpoint)
    inputs, sources = pipeline.inputs, pipeline.wiring.inputs
    _check(config, pipeline)
    window = int(text_config(checkpoint, pipeline.wiring.text[0].component).max_position_embeddings)

    def without_weights() -> Any:
        return UNet(hollow(UNet2DConditionModel, checkpoint.config("unet")))

    largest = 2 ** (len(config["block_out_channels"]) - 1)
    with guarded("the unet cannot be built from its configuration"):
        unit = multiple_of(without_weights(), inputs, largest)
    return ComponentSpec(
        name=name,
        source="unet",
        load=lambda: UNet(load_pretrained(UNet2DConditionModel, checkpoint.folder("unet"))).eval(),
        hollow=without_weights,
        inputs=inputs,
        outputs=(Tensor("out_sample", "float32", ("batch_size", config["out_channels"], "height", "width")),),
        axes={
            "batch_size": Axis(1, 3),
            "height": Axis(8, 20, unit),
            "width": Axis(8, 20, unit),
            "sequence_length": Axis(min(window, 8), window),
        },
        scale={"timestep": 999.0, "time_ids": 1024.0},
        repeat="timestep",
        per_prompt=tuple(each for each in sources if not sources[each].startswith(("latents", "timestep"))),
    )


def _check(config: Mapping[str, Any], pipeline: Pipeline) -> None:
    channels, width = config.get("in_channels"), config.get("cross_attention_dim")
    masked = 2 * pipeline.latents.channels + 1
    unsupported = {
        "takes class embeddings (class_embed_type)": config.get("class_embed_type") is not None,
        "takes class embeddings (num_class_embeds)": config.get("num_class_embeds") is not None,
        "takes projected text embeddings (encoder_hid_dim)": config.get("encoder_hid_dim") is not None,
        "has dual_cross_attention (text and image)": bool(config.get("dual_cross_attention")),
        f"has cross_attention_dim {width!r}": not isinstance(width, int),
        f"takes {channels} channels (a depth or edit model)": channels not in (config.get("out_channels"), masked),
    }
    for what, found in unsupported.items():
        if found:
            raise CheckpointError(f"the U-Net {what}, which is not supported")
    if config.get("addition_embed_type") != ("text_time" if pipeline.wiring.inputs_from("text.pooled") else None):
        raise CheckpointError(
            f"the U-Net takes the added embeddings {config.get('addition_embed_type')!r}, which this family does not: "
            "choose another --family"
        )
