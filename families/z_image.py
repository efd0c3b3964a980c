"""Z-Image: a language model as text encoder, and a transformer that reads text and picture as one sequence."""

from __future__ import annotations

from ..bundle.wiring import MOST_TOKENS, Flow, TextEncoder
from ..common.errors import CheckpointError
from . import parts
from .family import Configs, Family, Pipeline

_PATCH, _FRAMES = 2, 1
_SIDE = 128
"""What is drawn by default, in latents a side; diffusers' value."""
_TOKENS, _BUCKET = 512, 32
"""The most tokens of a prompt by default, and what the transformer fills them up to a multiple of."""


def _describe(configs: Configs) -> Pipeline:
    transformer = configs.config("transformer")
    patches = list(zip(transformer["all_patch_size"], transformer["all_f_patch_size"], strict=True))
    if (_PATCH, _FRAMES) not in patches:
        raise CheckpointError(
            f"the transformer has patches of {patches} latents and frames, its pipelines use ({_PATCH}, {_FRAMES}): "
            "give the transformer of a Z-Image"
        )
    text, *sides = (int(each) for each in transformer["axes_lens"])
    # the picture's position on the first axis follows those of the text, the first of which is 1
    most = min(MOST_TOKENS, (text - 2) // _BUCKET * _BUCKET)
    if most < _BUCKET or min(sides) < 1:
        raise CheckpointError(
            f"the transformer knows positions for {text - 2} tokens of text and {sides} of a picture (axes_lens), at "
            f"least {_BUCKET} and 1 are needed: give the config.json that belongs to its weights"
        )
    return parts.transformer_pipeline(
        configs,
        [
            TextEncoder(
                "text_encoder", "tokenizer", hidden="hidden_state", length=min(_TOKENS, most), bucket=_BUCKET, most=most
            )
        ],
        parts.latents_of(configs.config(parts.VAE), shifted=True, multiple=_PATCH),
        parts.transformer_inputs(
            channels=int(transformer["in_channels"]), text=int(transformer["cap_feat_dim"]), masked=True
        ),
        side=_SIDE,
        flow=Flow(_PATCH, even=True, inpaint_strength=1.0, most=min(sides)),
        guidance_added=1,
    )


FAMILY = Family(
    name="z-image",
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    models={
        "transformer": ("ZImageTransformer2DModel",),
        parts.VAE: (parts.KL, parts.TINY),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    },
    describe=_describe,
    steps=50,
    guidance=5.0,
)
