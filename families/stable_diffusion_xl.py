"""Stable Diffusion XL, base and refiner: two CLIP text encoders (the refiner has the second alone)."""

from __future__ import annotations

from ..bundle.wiring import Wiring
from . import parts
from .family import Configs, Family, Part, Pipeline

_ENCODERS = ("text_encoder", "text_encoder_2")


def _describe(configs: Configs) -> Pipeline:
    """What `model_index.json` leaves out is as the pipeline classes take it."""
    zeros = bool(configs.index.get("force_zeros_for_empty_prompt", True))
    scored = bool(configs.index.get("requires_aesthetics_score", False))
    unet = configs.config("unet")
    latents = parts.latents_of(configs.config(parts.VAE), deviations=True)
    inputs = parts.unet_inputs(unet, int(configs.config("text_encoder_2")["projection_dim"]))
    side = parts.side_of(unet) * latents.downscale
    encoders = [name for name in _ENCODERS if configs.has(name)]
    tasks = parts.ALL_TASKS[1:] if scored else parts.ALL_TASKS  # what is given a score refines an image
    return Pipeline(
        tasks=("inpaint",) if parts.inpaints(inputs, latents) else tasks,
        parts={
            **{name: Part("text", name) for name in encoders},
            **parts.autoencoders(configs),
            "unet": Part("denoiser", "unet"),
        },
        wiring=Wiring(
            text=tuple(parts.penultimate(configs, name, pooled=name == _ENCODERS[1]) for name in encoders),
            inputs=parts.sources(inputs, latents, scored=scored),
            empty_negative_is_zeros=zeros,
        ),
        latents=latents,
        inputs=inputs,
        width=side,
        height=side,
    )


FAMILY = Family(
    name="stable-diffusion-xl",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    models={
        "unet": (parts.UNET,),
        parts.VAE: (parts.KL, parts.TINY),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": parts.TOKENIZERS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": parts.TOKENIZERS,
    },
    optional=("text_encoder", "tokenizer"),
    describe=_describe,
    steps=20,
    guidance=5.0,
)
