"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional U-Net, an autoencoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...bundle import Latents, Prompt
from ..checkpoint import Checkpoint
from ..configs import TOKENIZERS, UNET, check_classes, vae_config
from ..plan import ComponentPlan
from . import autoencoder, clip, unet

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
NAME = "stable-diffusion"
CLASSES = {
    "unet": (UNET,),
    "vae": autoencoder.CLASSES,
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": TOKENIZERS,
}
"""What the components may be."""
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 7.5


def tasks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the checkpoint can do. Raises `CheckpointError` for a component of another class."""
    check_classes(checkpoint, CLASSES)
    return ("inpaint",) if unet.inpaints(checkpoint) else ("txt2img", "img2img", "inpaint")


def components(checkpoint: Checkpoint) -> list[ComponentPlan]:
    """The models, smallest first. Raises `CheckpointError` for a U-Net with inputs that this family lacks."""
    return [
        clip.text_encoder(checkpoint),
        *([autoencoder.tiny_decoder(checkpoint, latents(checkpoint))] if checkpoint.has(autoencoder.TINY) else []),
        autoencoder.encoder(checkpoint),
        autoencoder.decoder(checkpoint),
        unet.unet(checkpoint),
    ]


def latents(checkpoint: Checkpoint) -> Latents:
    """How latents relate to pixels."""
    return autoencoder.scaling(vae_config(checkpoint), NAME)


def default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and height that the checkpoint was trained for, in pixels."""
    return unet.default_size(checkpoint, latents(checkpoint).downscale, NAME)


def prompts(checkpoint: Checkpoint, folder: Path) -> dict[str, Prompt]:
    """Write the tokenizer below `folder` and say how it is used."""
    skips = tuple(f"clip_skip.{i}" for i in range(1, clip.layers_of(checkpoint, "text_encoder")))
    return {"text_encoder": replace(clip.tokenizer(checkpoint, "text_encoder", folder), skips=skips)}


def options(checkpoint: Checkpoint) -> dict[str, bool]:
    """What the runtime has to know beside the components."""
    return autoencoder.options(checkpoint, NAME)
