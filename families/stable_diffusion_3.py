"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5, which may be absent, and a multimodal transformer."""

from __future__ import annotations

from ..bundle.wiring import Flow, TextEncoder
from . import parts
from .family import Configs, Family, Pipeline

_T5_TOKENS = 256
"""The tokens that a prompt has for T5; diffusers' value."""


def _describe(configs: Configs) -> Pipeline:
    transformer, third = configs.config("transformer"), configs.has("text_encoder_3")
    patch = int(transformer["patch_size"])
    text = [
        parts.before_last(configs, "text_encoder", "tokenizer", 0),
        parts.before_last(configs, "text_encoder_2", "tokenizer_2", 1),
    ]
    if third:
        text.append(TextEncoder("text_encoder_3", "tokenizer_3", text=2, join="sequence", length=_T5_TOKENS))
    return parts.transformer_pipeline(
        configs,
        text,
        parts.latents_of(configs.config(parts.VAE), shifted=True, multiple=patch),
        parts.transformer_inputs(
            channels=int(transformer["in_channels"]),
            text=int(transformer["joint_attention_dim"]),
            pooled=int(transformer["pooled_projection_dim"]),
            skipping=int(transformer["num_layers"]),
        ),
        side=int(transformer["sample_size"]),
        flow=Flow(patch, max_shift=1.16, most=int(transformer["pos_embed_max_size"])),
        zeros=0 if third else _T5_TOKENS,
    )


FAMILY = Family(
    name="stable-diffusion-3",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    models={
        "transformer": ("SD3Transformer2DModel",),
        parts.VAE: (parts.KL, parts.TINY),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": parts.TOKENIZERS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": parts.TOKENIZERS,
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": parts.T5_TOKENIZERS,
    },
    optional=("text_encoder_3", "tokenizer_3"),
    describe=_describe,
    steps=28,
    guidance=7.0,
)
