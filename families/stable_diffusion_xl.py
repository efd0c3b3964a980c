"""Stable Diffusion XL, base and refiner: two CLIP text encoders (the refiner has the second alone)."""

from __future__ import annotations

from typing import Literal

from . import parts
from .family import Configs, Family, Pipeline
from .stable_diffusion import MODELS

_ENCODERS: tuple[tuple[str, str, Literal[0, 1]], ...] = (
    ("text_encoder", "tokenizer", 0),
    ("text_encoder_2", "tokenizer_2", 1),
)


def _describe(configs: Configs) -> Pipeline:
    """What `model_index.json` leaves out is as the pipeline classes take it."""
    return parts.pipeline(
        configs,
        [
            parts.before_last(configs, name, tokenizer, text, pooled=text == 1)
            for name, tokenizer, text in _ENCODERS
            if configs.has(name)
        ],
        parts.latents_of(configs.config(parts.VAE), deviations=True),
        parts.side_of(configs.config("unet")),
        pooled=int(configs.config("text_encoder_2")["projection_dim"]),
        scored=bool(configs.index.get("requires_aesthetics_score", False)),
        empty_negative_is_zeros=bool(configs.index.get("force_zeros_for_empty_prompt", True)),
    )


FAMILY = Family(
    name="stable-diffusion-xl",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    models={**MODELS, "text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": parts.TOKENIZERS},
    optional=("text_encoder", "tokenizer"),
    describe=_describe,
    steps=20,
    guidance=5.0,
)
