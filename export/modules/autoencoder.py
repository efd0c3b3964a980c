"""The autoencoders between pixels and latents: `AutoencoderKL`, and `AutoencoderTiny` (TAESD)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...bundle import Latents, Tensor
from ...common.errors import CheckpointError
from ...families import Pipeline
from ...families.parts import TINY, VAE, VAE_TINY, downscale, is_tiny, latents_of
from ..checkpoint import Checkpoint
from ..configs import vae_config
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec
from ..loading import load_pretrained


class Encoder(torch.nn.Module):
    """Pixels to mean and log variance of the latents, concatenated."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.model._encode(sample)


class TinyEncoder(torch.nn.Module):
    """Pixels to latents."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.model.encode(sample, return_dict=False)[0]


class Decoder(torch.nn.Module):
    """Unscaled latents to pixels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


class PreviewDecoder(torch.nn.Module):
    """Latents unscaled for the checkpoint's own autoencoder to pixels, by the small one."""

    def __init__(self, model: Any, own: Latents, tiny: Latents) -> None:
        super().__init__()
        self.model = model
        self.scale = own.scaling_factor / tiny.scaling_factor

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent_sample * self.scale, return_dict=False)[0]


def encoder(checkpoint: Checkpoint, component: str, pipeline: Pipeline) -> ComponentSpec:
    """The component. Its output is `latent_parameters`, or `latent_sample` where nothing is left to be drawn."""
    config = vae_config(checkpoint)
    down, tiny = downscale(config), is_tiny(config)
    channels = int(config["latent_channels"])
    shape = ("batch_size", channels if tiny else 2 * channels, "latent_height", "latent_width")
    wrapper = TinyEncoder if tiny else Encoder
    return ComponentSpec(
        name=component,
        source=VAE,
        load=lambda: wrapper(_load(checkpoint, VAE)).eval(),
        hollow=lambda: wrapper(_hollow(checkpoint, VAE)),
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
    return _decoder(checkpoint, component, VAE, Decoder)


def preview(checkpoint: Checkpoint, component: str, pipeline: Pipeline) -> ComponentSpec:
    """The small decoder, which takes what the own one takes. Raises `CheckpointError` when they do not fit."""
    config, own, ours = vae_config(checkpoint, VAE_TINY), vae_config(checkpoint), pipeline.latents
    fits = int(config["latent_channels"]) == int(own["latent_channels"]) and downscale(config) == downscale(own)
    if not is_tiny(config) or not fits or ours.mean:
        raise CheckpointError(
            f"{checkpoint.folder(VAE_TINY)} is no {TINY} for {own['latent_channels']} latent channels of "
            f"{downscale(own)} pixels: give the small autoencoder that was made for this checkpoint"
        )
    its = latents_of(config)
    spec = _decoder(checkpoint, component, VAE_TINY, lambda model: PreviewDecoder(model, ours, its))
    return replace(spec, facts=(ours.scaling_factor,))


def _decoder(
    checkpoint: Checkpoint, name: str, source: str, wrapper: Callable[[Any], torch.nn.Module]
) -> ComponentSpec:
    config = vae_config(checkpoint, source)
    shape = ("batch_size", int(config["latent_channels"]), "latent_height", "latent_width")
    return ComponentSpec(
        name=name,
        source=source,
        load=lambda: wrapper(_load(checkpoint, source)).eval(),
        hollow=lambda: wrapper(_hollow(checkpoint, source)),
        inputs=(Tensor("latent_sample", "float32", shape),),
        outputs=(Tensor("sample", "float32", ("batch_size", config["out_channels"], "height", "width")),),
        axes={"batch_size": Axis(1, 3), "latent_height": Axis(4, 12), "latent_width": Axis(4, 12)},
    )


def _load(checkpoint: Checkpoint, source: str) -> Any:
    return load_pretrained(_class(checkpoint, source), checkpoint.folder(source))


def _hollow(checkpoint: Checkpoint, source: str) -> Any:
    return hollow(_class(checkpoint, source), checkpoint.config(source))


def _class(checkpoint: Checkpoint, source: str) -> Any:
    import diffusers

    return getattr(diffusers, checkpoint.kind(source)[1])
