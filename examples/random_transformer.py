"""Checkpoints of transformers with random weights: the topologies of Stable Diffusion 3 and FLUX.1, with small widths.

python -m diffoundry.examples.random_transformer flux-dev-small build/flux-dev-small
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from .random_checkpoint import _draw, _special_ids, _tokenizer, name_as_of_old

_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_T5 = {"d_model": 96, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2, "feed_forward_proj": "gated-gelu"}
_VAE = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 16}
_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24 + 40,
    "pos_embed_max_size": 24,
}
_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
_FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_SHIFTING = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


@dataclass(frozen=True, slots=True)
class Size:
    """pipeline: its class. transformer, vae, scheduler: configurations. third: whether Stable Diffusion 3 has a T5."""

    pipeline: str
    transformer: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    third: bool = True
    vae: Mapping[str, Any] = field(default_factory=lambda: {"scaling_factor": 1.5305, "shift_factor": 0.0609})


SIZES = {
    "sd3-small": Size("StableDiffusion3Pipeline", _SD3, {"shift": 3.0}),
    "sd35-small": Size(
        "StableDiffusion3Pipeline",
        {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        {"shift": 3.0},
        third=False,
    ),
    "flux-dev-small": Size(
        "FluxPipeline",
        {**_FLUX, "guidance_embeds": True},
        _SHIFTING,
        vae=_FLUX_VAE,
    ),
    "flux-schnell-small": Size("FluxPipeline", _FLUX, {"shift": 1.0}, vae=_FLUX_VAE),
    "flux-kontext-small": Size("FluxKontextPipeline", {**_FLUX, "guidance_embeds": True}, _SHIFTING, vae=_FLUX_VAE),
    "flux-fill-small": Size(
        "FluxFillPipeline",
        {**_FLUX, "guidance_embeds": True, "in_channels": 384, "out_channels": 64},
        _SHIFTING,
        vae=_FLUX_VAE,
    ),
    "flux-control-small": Size(
        "FluxControlPipeline",
        {**_FLUX, "guidance_embeds": True, "in_channels": 128, "out_channels": 64},
        _SHIFTING,
        vae=_FLUX_VAE,
    ),
}


def make(size: str, out: Path, seed: int = 0) -> None:
    """Write a diffusers folder of the given size to `out`."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    asked = SIZES[size]
    torch.manual_seed(seed)
    of_flux = asked.pipeline.startswith("Flux")
    tokenizer = _tokenizer(1000, "<|endoftext|>")
    ids = _special_ids(tokenizer)
    parts: dict[str, Any] = {}

    def drawn(model: Any) -> Any:
        _draw(model.requires_grad_(False))
        return model.eval()

    def clip(kind: Any, suffix: str, **options: Any) -> None:
        config = CLIPTextConfig(vocab_size=1000, max_position_embeddings=77, **{**ids, **_TEXT, **options})
        parts["tokenizer" + suffix], parts["text_encoder" + suffix] = tokenizer, drawn(kind(config))

    def t5(suffix: str) -> None:
        own = _unigram()
        parts["tokenizer" + suffix] = own
        parts["text_encoder" + suffix] = drawn(T5EncoderModel(T5Config(vocab_size=len(own), **_T5)))

    if of_flux:
        clip(CLIPTextModel, "")
        t5("_2")
    else:
        clip(CLIPTextModelWithProjection, "", projection_dim=24)
        clip(CLIPTextModelWithProjection, "_2", hidden_size=48, intermediate_size=96, projection_dim=40)
        if asked.third:
            t5("_3")
        else:
            parts |= {"tokenizer_3": None, "text_encoder_3": None}
    kind = diffusers.FluxTransformer2DModel if of_flux else diffusers.SD3Transformer2DModel
    parts["transformer"] = drawn(kind(**asked.transformer))
    parts["vae"] = drawn(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **{**_VAE, **asked.vae},
        )
    )
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(**asked.scheduler)
    pipeline = getattr(diffusers, asked.pipeline)(**parts)
    pipeline.save_pretrained(out)
    for name in ("text_encoder", "text_encoder_2"):
        if (out / name / "model.safetensors").exists() and not (of_flux and name != "text_encoder"):
            name_as_of_old(out / name)


def _unigram() -> Any:
    """A tokenizer of T5's kind, whose pieces are letters and a few words."""
    from transformers import T5TokenizerFast

    words = ("a", "large", "small", "red", "star", "ring", "on", "the", "left", "navy", "background")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words), *string.ascii_lowercase, *",.'-"]
    scores = {f"▁{word}": -2.0 for word in words}
    return T5TokenizerFast(vocab=[(piece, scores.get(piece, -5.0)) for piece in pieces], extra_ids=0)


@click.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("out", type=click.Path(path_type=Path))
def main(size: str, out: Path) -> None:
    """Write a checkpoint with random weights."""
    make(size, out)


if __name__ == "__main__":
    main()
