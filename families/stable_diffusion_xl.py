"""Stable Diffusion XL, base and refiner: two CLIP text encoders (the refiner has the second alone)."""

from __future__ import annotations

from ..bundle.wiring import TextEncoder
from . import parts
from .family import Configs, Family, Pipeline
from .stable_diffusion import MODELS


def _describe(configs: Configs) -> Pipeline:
    """What `model_index.json` leaves out is as the pipeline classes take it."""
    return parts.pipeline(
        configs,
        [_encoder(configs, name) for name in ("text_encoder", "text_encoder_2") if configs.has(name)],
        parts.latents_of(configs.config(parts.VAE), deviations=True),
        parts.side_of(configs.config("unet")),
        pooled=int(configs.config("text_encoder_2")["projection_dim"]),
        scored=bool(configs.index.get("requires_aesthetics_score", False)),
        empty_negative_is_zeros=bool(configs.index.get("force_zeros_for_empty_prompt", True)),
    )


def _encoder(configs: Configs, name: str) -> TextEncoder:
    """The input of the last layer is read, and of the second encoder the pooled embedding too."""
    last, second = int(configs.config(name)["num_hidden_layers"]) - 1, name == "text_encoder_2"
    return TextEncoder(
        name,
        "tokenizer_2" if second else "tokenizer",
        text=1 if second else 0,
        hidden=f"hidden_states.{last}",
        skips=tuple(f"hidden_states.{i}" for i in reversed(range(last))),
        pooled="text_embeds" if second else "",
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
