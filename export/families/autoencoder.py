"""The autoencoders between pixels and latents: `AutoencoderKL`, and `AutoencoderTiny` (TAESD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...bundle import CheckpointError, Latents, Tensor
from ..checkpoint import Checkpoint
from ..loading import load_pretrained
from ..plan import Axis, ComponentPlan

TINY = "vae_tiny"
"""The source name of a second, small autoencoder, whose decoder is an alternative and a preview."""
_TINY_CLASS = "AutoencoderTiny"


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
        self.shift = tiny.shift_factor - own.shift_factor * self.scale

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent_sample * self.scale + self.shift, return_dict=False)[0]


def is_tiny(config: dict[str, Any]) -> bool:
    """Whether this is the configuration of an `AutoencoderTiny`."""
    return config.get("_class_name") == _TINY_CLASS


def encoder(checkpoint: Checkpoint) -> ComponentPlan:
    """`vae_encoder`. Its output is `latent_parameters`, or `latent_sample` where nothing is left to be drawn."""
    config = checkpoint.config("vae")
    down, tiny = downscale(config), is_tiny(config)
    channels = int(config["latent_channels"])
    shape = ("batch_size", channels if tiny else 2 * channels, "latent_height", "latent_width")
    return ComponentPlan(
        name="vae_encoder",
        source="vae",
        load=lambda: (TinyEncoder if tiny else Encoder)(_load(checkpoint, "vae")).eval(),
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
    config = checkpoint.config("vae")
    return _decoder("vae_decoder", "vae", config, lambda: Decoder(_load(checkpoint, "vae")).eval())


def tiny_decoder(checkpoint: Checkpoint) -> ComponentPlan:
    """`vae_tiny_decoder`, which takes what `vae_decoder` takes. Raises `CheckpointError` when they do not fit."""
    config, own = checkpoint.config(TINY), checkpoint.config("vae")
    fits = int(config["latent_channels"]) == int(own["latent_channels"]) and downscale(config) == downscale(own)
    if not is_tiny(config) or not fits or own.get("latents_mean"):
        raise CheckpointError(
            f"{checkpoint.folder(TINY)} is no {_TINY_CLASS} for {own['latent_channels']} latent channels of "
            f"{downscale(own)} pixels: give the small autoencoder that was made for this checkpoint"
        )
    ours, its = scaling(own), scaling(config)
    plan = _decoder("vae_tiny_decoder", TINY, config, lambda: PreviewDecoder(_load(checkpoint, TINY), ours, its).eval())
    return replace(plan, facts=(ours.scaling_factor, ours.shift_factor))


def _decoder(name: str, source: str, config: dict[str, Any], load: Any) -> ComponentPlan:
    shape = ("batch_size", int(config["latent_channels"]), "latent_height", "latent_width")
    return ComponentPlan(
        name=name,
        source=source,
        load=load,
        inputs=(Tensor("latent_sample", "float32", shape),),
        outputs=(Tensor("sample", "float32", ("batch_size", config["out_channels"], "height", "width")),),
        axes={"batch_size": Axis(1, 3), "latent_height": Axis(4, 12), "latent_width": Axis(4, 12)},
    )


def _load(checkpoint: Checkpoint, source: str) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    kind = AutoencoderTiny if is_tiny(checkpoint.config(source)) else AutoencoderKL
    return load_pretrained(kind, checkpoint.folder(source))


def options(checkpoint: Checkpoint) -> dict[str, bool]:
    """What the runtime has to know of the checkpoint's own autoencoder."""
    return {"tiny_autoencoder": True} if is_tiny(checkpoint.config("vae")) else {}


def downscale(config: dict[str, Any]) -> int:
    """Pixels a latent, along one side. Raises `CheckpointError` when the configuration names no blocks."""
    name = "decoder_block_out_channels" if is_tiny(config) else "block_out_channels"
    blocks = len(config[name])
    if not blocks:
        raise CheckpointError(f"the vae configuration has no {name}: download the checkpoint again")
    return int(2 ** (blocks - 1))


def scaling(config: dict[str, Any]) -> Latents:
    """How latents relate to the pixels of the autoencoder with this configuration."""
    down = downscale(config)
    side = config.get("sample_size")
    tile = int(side) // down if isinstance(side, int) and side >= down else 512 // down
    return Latents(
        channels=int(config["latent_channels"]),
        downscale=down,
        scaling_factor=float(config.get("scaling_factor", 1.0 if is_tiny(config) else 0.18215)),
        shift_factor=0.0 if is_tiny(config) else float(config.get("shift_factor") or 0.0),
        tile=tile,
        mean=_per_channel(config, "latents_mean"),
        std=_per_channel(config, "latents_std"),
    )


def _per_channel(config: dict[str, Any], name: str) -> tuple[float, ...]:
    """Both or neither, as the pipelines read them."""
    if not config.get("latents_mean") or not config.get("latents_std"):
        return ()
    return tuple(float(value) for value in config[name])
