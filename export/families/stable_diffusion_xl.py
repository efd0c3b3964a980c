"""Stable Diffusion XL, base and refiner: two CLIP text encoders (the refiner has the second alone)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...bundle import Latents, Prompt
from ..checkpoint import Checkpoint
from ..configs import TOKENIZERS, UNET, check_classes, text_config, vae_config
from ..plan import ComponentPlan
from . import autoencoder, clip, unet

PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
NAME = "stable-diffusion-xl"
CLASSES = {
    "unet": (UNET,),
    "vae": autoencoder.CLASSES,
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": TOKENIZERS,
}
"""What the components may be; the first text encoder is left out of some."""
_FIRST = {"text_encoder": ("CLIPTextModel",), "tokenizer": TOKENIZERS}
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 5.0
_OPTIONS = {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False}
"""What the pipeline classes take, and what they take it to be when `model_index.json` does not say."""


def tasks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the checkpoint can do; one that is told an aesthetic score (the refiner) starts from an image."""
    check_classes(checkpoint, CLASSES | (_FIRST if checkpoint.has("text_encoder") else {}))
    if unet.inpaints(checkpoint):
        return ("inpaint",)
    if options(checkpoint)["requires_aesthetics_score"]:
        return ("img2img", "inpaint")
    return ("txt2img", "img2img", "inpaint")


def components(checkpoint: Checkpoint) -> list[ComponentPlan]:
    """The models, smallest first. Raises `CheckpointError` for a U-Net with inputs that this family lacks."""
    pooled = int(text_config(checkpoint, "text_encoder_2").projection_dim)
    return [
        *(clip.hidden_states(checkpoint, name) for name in _encoders(checkpoint)),
        *([autoencoder.tiny_decoder(checkpoint, latents(checkpoint))] if checkpoint.has(autoencoder.TINY) else []),
        autoencoder.encoder(checkpoint),
        autoencoder.decoder(checkpoint),
        unet.unet(checkpoint, pooled=pooled),
    ]


def _encoders(checkpoint: Checkpoint) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if checkpoint.has(name)]


def latents(checkpoint: Checkpoint) -> Latents:
    """How latents relate to pixels."""
    return autoencoder.scaling(vae_config(checkpoint), NAME)


def default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and height that the checkpoint was trained for, in pixels."""
    return unet.default_size(checkpoint, latents(checkpoint).downscale, NAME)


def prompts(checkpoint: Checkpoint, folder: Path) -> dict[str, Prompt]:
    """Write the tokenizers below `folder` and say how they are used: the input of an encoder's last layer is read."""
    result = {}
    for name in _encoders(checkpoint):
        last = clip.layers_of(checkpoint, name) - 1
        result[name] = replace(
            clip.tokenizer(checkpoint, name, folder),
            hidden=f"hidden_states.{last}",
            skips=tuple(f"hidden_states.{i}" for i in reversed(range(last))),
            pooled="text_embeds" if name == "text_encoder_2" else "",
        )
    return result


def options(checkpoint: Checkpoint) -> dict[str, bool]:
    """What the runtime has to know beside the components: what `model_index.json` tells the pipeline class."""
    told = {name: bool(checkpoint.index.get(name, default)) for name, default in _OPTIONS.items()}
    return told | autoencoder.options(checkpoint, NAME)
