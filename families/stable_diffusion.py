"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional U-Net, an autoencoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..bundle.wiring import TextEncoder
from . import parts
from .family import Configs, Family, Pipeline

_OLD = (0, 9)
_OLD_SIDE = 64
_RELEASE = re.compile(r"\d+(?:\.\d+)*")
_FROM_TEXT = {"steps_offset": 1, "clip_sample": False}
MODELS = {
    "unet": (parts.UNET,),
    parts.VAE: (parts.KL, parts.TINY),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": parts.TOKENIZERS,
}


def drawn_side(unet: Mapping[str, Any]) -> int:
    """What is drawn by default, in latents a side, of a U-Net with this configuration.

    The classes take a `sample_size` under 64 for a mistake in what was written before diffusers 0.9.
    """
    side, release = parts.side_of(unet), _RELEASE.match(str(unet.get("_diffusers_version")))
    old = release is not None and tuple(map(int, release[0].split("."))) < _OLD
    return max(side, _OLD_SIDE) if old else side


def _describe(configs: Configs) -> Pipeline:
    return describe(configs, drawn_side(configs.config("unet")))


def describe(configs: Configs, side: int, *, strength_by_sampler: bool = False) -> Pipeline:
    """The pipeline of a checkpoint that draws `side` latents by default; see `Wiring.strength_by_sampler`."""
    layers = int(configs.config("text_encoder")["num_hidden_layers"])
    # where layers are skipped, the final norm is applied to an earlier one
    text = TextEncoder("text_encoder", "tokenizer", skips=tuple(f"clip_skip.{i}" for i in range(1, layers)))
    latents = parts.latents_of(configs.config(parts.VAE))
    return parts.pipeline(configs, [text], latents, side, strength_by_sampler=strength_by_sampler)


FAMILY = Family(
    name="stable-diffusion",
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    models=MODELS,
    describe=_describe,
    steps=20,
    guidance=7.5,
    # these classes correct configurations that early versions wrote, those of the other families do not
    scheduler={"txt2img": _FROM_TEXT, "img2img": _FROM_TEXT, "inpaint": {"steps_offset": 1, "skip_prk_steps": True}},
)
