"""FLUX.1: a CLIP and a T5 text encoder, and a transformer that reads packed latents.

Kontext reads a picture as more tokens, where there is one, Fill the masked picture and the mask beside the latents, and
the control models (Canny, Depth) a picture beside them.
"""

from __future__ import annotations

from typing import Any

from ..bundle.wiring import Flow, TextEncoder
from ..common.errors import CheckpointError
from . import parts
from .family import Configs, Family, Pipeline

_PATCH = 2
_T5_TOKENS, _SIDE = 512, 128
"""The tokens that a prompt has for T5, and what is drawn by default, in latents a side; diffusers' values."""
_SHOWN = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    *((1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688)),
    (1568, 672),
)
"""The sizes of pictures that Kontext was trained with."""
_KONTEXT, _FILL, _CONTROL = "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"
_KINDS: dict[str, dict[str, Any]] = {
    _KONTEXT: {"tasks": ("txt2img", "img2img"), "picture_sizes": _SHOWN},
    _FILL: {"tasks": ("inpaint",), "latents_from": "latents.filled", "guidance": 30.0},
    _CONTROL: {"tasks": ("img2img",), "latents_from": "latents.beside", "guidance": 10.0},
}
"""By pipeline class what is not as in `FluxPipeline`."""


def _describe(configs: Configs) -> Pipeline:
    kind, transformer = str(configs.index.get("_class_name")), configs.config("transformer")
    guided = bool(transformer["guidance_embeds"])
    latents = parts.latents_of(configs.config(parts.VAE), shifted=True, multiple=_PATCH)
    beside = {_FILL: latents.channels + latents.downscale**2, _CONTROL: latents.channels}.get(kind, 0)
    due = (latents.channels + beside) * _PATCH**2
    if int(transformer["in_channels"]) != due:
        raise CheckpointError(
            f"the transformer takes {transformer['in_channels']} numbers a token (in_channels), a {kind} gives it "
            f"{due}: it is of another kind; name its pipeline class in model_index.json, or give its own checkpoint"
        )
    inputs = parts.transformer_inputs(
        channels=int(transformer["in_channels"]) // _PATCH**2,
        text=int(transformer["joint_attention_dim"]),
        pooled=int(transformer["pooled_projection_dim"]),
        guided=guided,
        shown=kind == _KONTEXT,
    )
    text = [
        TextEncoder("text_encoder", "tokenizer", hidden="", pooled="pooler_output"),
        TextEncoder("text_encoder_2", "tokenizer_2", text=1, join="sequence", length=_T5_TOKENS),
    ]
    flow = Flow(_PATCH, even=True, strength=1.0 if kind == _FILL else 0.6)
    # what is not told the guidance was distilled to a few steps without any
    usual: dict[str, Any] = {} if guided else {"steps": 4, "guidance": 1.0}
    return parts.transformer_pipeline(
        configs, text, latents, inputs, side=_SIDE, flow=flow, **{**usual, **_KINDS.get(kind, {})}
    )


FAMILY = Family(
    name="flux",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", _KONTEXT, _FILL, _CONTROL),
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
