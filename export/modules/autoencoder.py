"""The autoencoders between pixels and latents: `AutoencoderKL`, and `AutoencoderTiny` (TAESD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import torch

from ...bundle import Tensor
from ...common.errors import CheckpointError
from ...families import Pipeline
from ...families.parts import TINY, VAE, VAE_TINY, downscale, is_tiny, latents_of
from ..checkpoint import Checkpoint
from ..configs import vae_config
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec
from ..loading import load_pretrained


class Encoder(torch.nn.Module):
    """Pixels to mean and log variance of the latents, concatenated; of a tiny autoencoder to the latents."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        encoded = self.model.encode(sample)
        return encoded.latents if "latents" in encoded else encoded.latent_dist.parameters


class Decoder(torch.nn.Module):
    """Unscaled latents, times `scale` and with `shift` added, to pixels."""

    def __init__(self, model: Any, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.model, self.scale, self.shift = model, scale, shift

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        scaled = latent_sample * self.scale
        return self.model.decode(scaled + self.shift if self.shift else scaled, return_dict=False)[0]


def encoder(checkpoint: Checkpoint, component: str, pipeline: Pipeline) -> ComponentSpec:
    """The component. Its output is `latent_parameters`, or `latent_sample` where nothing is left to be drawn."""
    config = vae_config(checkpoint)
    kind = getattr(diffusers, config["_class_name"])
    down, tiny = downscale(config), is_tiny(config)
    channels = int(config["latent_channels"])
    shape = ("batch_size", channels if tiny else 2 * channels, "latent_height", "latent_width")
    return ComponentSpec(
        name=component,
        source=VAE,
        load=lambda: Encoder(load_pretrained(kind, checkpoint.folder(VAE))).eval(),
        hollow=lambda: Encoder(hollow(kind, checkpoint.config(VAE))),
        inputs=(Tensor("sample", "float32", ("batch_size", config["in_channels"], "sample_height", "sample_width")),),
        outputs=(Tensor("latent_sample" if tiny else "latent_parameters", "float32", shape),),
        axes={
            "batch_size": Axis(1, 3),
            "sample_height": Axis(4 * down, 12 * down, down),
            "sample_width": Axis(4 * down, 12 * down, down),
        },
    )


def decoder(checkpoint: Checkpoint, component: str, pipeline: Pipeline) -> ComponentSpec:
    """The checkpoint's own decoder."""
    return _decoder(checkpoint, component, VAE)


def preview(checkpoint: Checkpoint, component: str, pipeline: Pipeline) -> ComponentSpec:
    """The small decoder, which takes what the own one takes. Raises `CheckpointError` when they do not fit.

    It has its own scale, and a shift where the pipeline classes read one, as if it were the pipeline's autoencoder.
    """
    config, own, ours = vae_config(checkpoint, VAE_TINY), vae_config(checkpoint), pipeline.latents
    fits = int(config["latent_channels"]) == int(own["latent_channels"]) and downscale(config) == downscale(own)
    if not is_tiny(config) or not fits or ours.mean:
        raise CheckpointError(
            f"{checkpoint.folder(VAE_TINY)} is no {TINY} for {own['latent_channels']} latent channels of "
            f"{downscale(own)} pixels: give the small autoencoder that was made for this checkpoint"
        )
    theirs = latents_of(config, shifted=pipeline.wiring.flow is not None)
    scale = ours.scaling_factor / theirs.scaling_factor
    spec = _decoder(checkpoint, component, VAE_TINY, scale, theirs.shift_factor - ours.shift_factor * scale)
    return replace(spec, facts=(ours.scaling_factor, *((ours.shift_factor,) if ours.shift_factor else ())))


def _decoder(checkpoint: Checkpoint, name: str, source: str, scale: float = 1.0, shift: float = 0.0) -> ComponentSpec:
    config = vae_config(checkpoint, source)
    kind = getattr(diffusers, config["_class_name"])
    shape = ("batch_size", int(config["latent_channels"]), "latent_height", "latent_width")
    return ComponentSpec(
        name=name,
        source=source,
        load=lambda: Decoder(load_pretrained(kind, checkpoint.folder(source)), scale, shift).eval(),
        hollow=lambda: Decoder(hollow(kind, checkpoint.config(source)), scale, shift),
        inputs=(Tensor("latent_sample", "float32", shape),),
        outputs=(Tensor("sample", "float32", ("batch_size", config["out_channels"], "height", "width")),),
        axes={"batch_size": Axis(1, 3), "latent_height": Axis(4, 12), "latent_width": Axis(4, 12)},
    )
