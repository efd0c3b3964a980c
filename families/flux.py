"""FLUX.1: a CLIP and a T5 text encoder, and a transformer that reads packed latents."""

from __future__ import annotations

from ..bundle.wiring import Flow, TextEncoder
from . import parts
from .family import Configs, Family, Pipeline

_PATCH = 2
_T5_TOKENS, _SIDE = 512, 128
"""The tokens that a prompt has for T5, and what is drawn by default, in latents a side; diffusers' values."""


def _describe(configs: Configs) -> Pipeline:
    transformer = configs.config("transformer")
    guided = bool(transformer["guidance_embeds"])
    latents = parts.latents_of(configs.config(parts.VAE), shifted=True, multiple=_PATCH)
    inputs = parts.transformer_inputs(
        channels=int(transformer["in_channels"]) // _PATCH**2,
        text=int(transformer["joint_attention_dim"]),
        pooled=int(transformer["pooled_projection_dim"]),
        guided=guided,
    )
    text = [
        TextEncoder("text_encoder", "tokenizer", hidden="", pooled="pooler_output"),
        TextEncoder("text_encoder_2", "tokenizer_2", text=1, join="sequence", length=_T5_TOKENS),
    ]
    return parts.transformer_pipeline(
        configs,
        text,
        latents,
        inputs,
        side=_SIDE,
        flow=Flow(_PATCH, even=True),
        # what is not told the guidance was distilled to a few steps without any
        steps=None if guided else 4,
        guidance=None if guided else 1.0,
    )


FAMILY = Family(
    name="flux",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    models={
        "transformer": ("FluxTransformer2DModel",),
        parts.VAE: (parts.KL, parts.TINY),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": parts.TOKENIZERS,
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": parts.T5_TOKENIZERS,
    },
    describe=_describe,
    steps=28,
    guidance=3.5,
)
