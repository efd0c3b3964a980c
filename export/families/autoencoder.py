"""The autoencoders between pixels and latents: `AutoencoderKL`, and `AutoencoderTiny` (TAESD)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...bundle import Latents, Tensor
from ...bundle.pipelines import INPAINT_BY_FACTOR, latent_deviations
from ...common.checks import is_finite
from ...common.errors import CheckpointError
from ..checkpoint import Checkpoint
from ..configs import KL, vae_config
from ..configs import TINY as TINY_CLASS
from ..fit import hollow
from ..loading import load_pretrained
from ..plan import Axis, ComponentPlan

TINY = "vae_tiny"
"""The source name of a second, small autoencoder, whose decoder is an alternative and a preview."""
CLASSES = (KL, TINY_CLASS)
"""The autoencoders that are supported."""


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


def is_tiny(config: dict[str, Any]) -> bool:
    """Whether this is the configuration of an `AutoencoderTiny`."""
    return config.get("_class_name") == TINY_CLASS


def encoder(checkpoint: Checkpoint) -> ComponentPlan:
    """`vae_encoder`. Its output is `latent_parameters`, or `latent_sample` where nothing is left to be drawn."""
    config = vae_config(checkpoint)
    down, tiny = downscale(config), is_tiny(config)
    channels = int(config["latent_channels"])
    shape = ("batch_size", channels if tiny else 2 * channels, "latent_height", "latent_width")
    wrapper = TinyEncoder if tiny else Encoder
    return ComponentPlan(
        name="vae_encoder",
        source="vae",
        load=lambda: wrapper(_load(checkpoint, "vae")).eval(),
        hollow=lambda: wrapper(_hollow(checkpoint, "vae")),
        inputs=(Tensor("sample", "float32", ("batch_size", config["in_channels"], "sample_height", "sample_width")),),
        outputs=(Tensor("latent_sample" if tiny else "latent_parameters", "float32", shape),),
        axes={
            "batch_size": Axis(1, 3),
            "sample_height": Axis(4 * down, 12 * down, down),
            "sample_width": Axis(4 * down, 12 * down, down),
        },
    )


def decoder(checkpoint: Checkpoint) -> ComponentPlan:
    """`vae_decoder`."""
    return _decoder(checkpoint, "vae_decoder", "vae", Decoder)


def tiny_decoder(checkpoint: Checkpoint, ours: Latents) -> ComponentPlan:
    """`vae_tiny_decoder`, which takes what `vae_decoder` takes. Raises `CheckpointError` when they do not fit."""
    config, own = vae_config(checkpoint, TINY), vae_config(checkpoint)
    fits = int(config["latent_channels"]) == int(own["latent_channels"]) and downscale(config) == downscale(own)
    if not is_tiny(config) or not fits or ours.mean:
        raise CheckpointError(
            f"{checkpoint.folder(TINY)} is no {TINY_CLASS} for {own['latent_channels']} latent channels of "
            f"{downscale(own)} pixels: give the small autoencoder that was made for this checkpoint"
        )
    its = scaling(config)
    plan = _decoder(checkpoint, "vae_tiny_decoder", TINY, lambda model: PreviewDecoder(model, ours, its))
    return replace(plan, facts=(ours.scaling_factor,))


def _decoder(
    checkpoint: Checkpoint, name: str, source: str, wrapper: Callable[[Any], torch.nn.Module]
) -> ComponentPlan:
    config = vae_config(checkpoint, source)
    shape = ("batch_size", int(config["latent_channels"]), "latent_height", "latent_width")
    return ComponentPlan(
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


def options(checkpoint: Checkpoint, family: str) -> dict[str, bool]:
    """What the runtime has to know of the checkpoint's own autoencoder."""
    config = vae_config(checkpoint)
    told = {"tiny_autoencoder": is_tiny(config), INPAINT_BY_FACTOR: bool(latent_deviations(family, config)[0])}
    return {name: True for name, holds in told.items() if holds}


def downscale(config: dict[str, Any]) -> int:
    """Pixels a latent, along one side. Raises `CheckpointError` when the configuration names no blocks."""
    name = "decoder_block_out_channels" if is_tiny(config) else "block_out_channels"
    blocks = len(config[name])
    if not blocks:
        raise CheckpointError(f"the vae configuration has no {name}: download the checkpoint again")
    return int(2 ** (blocks - 1))


def scaling(config: dict[str, Any], family: str = "") -> Latents:
    """How latents relate to the pixels of the autoencoder with this configuration, as the pipelines of `family` do it.

    Raises `CheckpointError` when there is not one mean and deviation for each channel.
    """
    mean, std = latent_deviations(family, config)
    channels = int(config["latent_channels"])
    if not len(mean) == len(std) == (channels if mean else 0):
        raise CheckpointError(
            f"the vae configuration has {len(mean)} latents_mean and {len(std)} latents_std for {channels} latent "
            "channels: give one of each a channel, or leave both out"
        )
    factor = config.get("scaling_factor", 1.0 if is_tiny(config) else 0.18215)
    if not is_finite(factor) or not factor:
        raise CheckpointError(
            f"the scaling_factor in the vae's config.json must be a number other than 0, found {factor!r}: "
            "give that of the model (0.18215 for Stable Diffusion 1 and 2, 0.13025 for XL)"
        )
    down = downscale(config)
    side = config.get("sample_size")
    tile = int(side) // down if isinstance(side, int) and side >= down else 512 // down
    return Latents(
        channels=channels,
        downscale=down,
        scaling_factor=float(factor),
        tile=tile,
        mean=mean,
        std=std,
    )
