"""ControlNets (Zhang et al. 2023), and the U-Net that their residuals are added in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from ...bundle import Tensor
from ...bundle.wiring import PICTURE, SCALE
from ...families import Pipeline
from ...families.control import PREFIX, residuals
from ..checkpoint import Checkpoint
from ..configs import control_config, unet_config
from ..fit import hollow
from ..graphs.controlled import write_controlled
from ..graphs.spec import ComponentSpec
from ..loading import load_pretrained
from .unet import UNet, unet

_MOST_HALVINGS = 8


class ControlNet(torch.nn.Module):
    """The residuals for one denoising prediction, each times its scale.

    Of a sample that has a mask and the masked image beside the latents, the latents alone are read.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        scale: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        down, middle = self.model(
            sample[:, : self.model.config.in_channels],
            timestep,
            encoder_hidden_states,
            controlnet_cond,
            added_cond_kwargs=None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )
        return tuple(value * scale[:, i, None, None, None] for i, value in enumerate((*down, middle)))


class ControlledUNet(UNet):
    """One denoising prediction, with residuals added on the way."""

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        **residuals: torch.Tensor,
    ) -> torch.Tensor:
        *down, middle = residuals.values()
        result: torch.Tensor = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids},
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return result


def controlnet(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`, which reads what the denoiser reads, a picture, and a scale for each residual."""
    config = control_config(checkpoint, name.removeprefix(PREFIX))
    own = {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}
    given = [tensor for tensor in pipeline.inputs if tensor.name in own]
    made = residuals(config, bool(config.get("global_pool_conditions")))
    down = pipeline.latents.downscale
    denoiser = _denoiser(checkpoint, pipeline)
    picture = ("batch_size", int(config["conditioning_channels"]), "sample_height", "sample_width")
    inputs = (*given, Tensor(PICTURE, "float32", picture), Tensor(SCALE, "float32", ("batch_size", len(made))))
    return replace(
        denoiser,
        name=name,
        source=name,
        load=lambda: ControlNet(load_pretrained(ControlNetModel, checkpoint.folder(name))).eval(),
        hollow=lambda: ControlNet(hollow(ControlNetModel, checkpoint.config(name))),
        inputs=inputs,
        outputs=made,
        tied={"sample_height": ("height", down, 1), "sample_width": ("width", down, 1), **_halves()},
        per_prompt=(*(each for each in denoiser.per_prompt if each in own), PICTURE),
    )


def controlled_unet(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`: the denoiser that takes residuals."""
    denoiser = _denoiser(checkpoint, pipeline)
    more = residuals(unet_config(checkpoint))
    return replace(
        denoiser,
        name=name,
        load=lambda: ControlledUNet(load_pretrained(UNet2DConditionModel, checkpoint.folder("unet"))).eval(),
        hollow=lambda: ControlledUNet(hollow(UNet2DConditionModel, checkpoint.config("unet"))),
        inputs=(*denoiser.inputs, *more),
        tied=_halves(),
        rewrites=denoiser.name,
        rewrite=partial(write_controlled, residuals=more),
    )


def _denoiser(checkpoint: Checkpoint, pipeline: Pipeline) -> ComponentSpec:
    return unet(checkpoint, next(name for name, part in pipeline.parts.items() if part.role == "denoiser"), pipeline)


def _halves() -> dict[str, tuple[str, int, int]]:
    """The axes of values whose sides were halved."""
    return {f"{axis}_{2**k}": (axis, 1, 2**k) for axis in ("height", "width") for k in range(1, _MOST_HALVINGS)}
