"""Checkpoints of transformers with random weights: Stable Diffusion 3, FLUX.1 and Z-Image, with small widths.

    python -m diffoundry.examples.random_transformer flux-dev-small build/flux-dev-small
    python -m diffoundry.examples.random_transformer flux-dev build/flux-dev --layers 8 --single-layers 23

`flux-dev` has the published widths, its weights in bfloat16 (24 GB with all its layers) and small text encoders; it is
written a shard at a time, and is there to see what a large checkpoint takes.
"""

from __future__ import annotations

import itertools
import shutil
import string
from collections.abc import Iterator, Mapping
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
_Z_IMAGE = {
    "in_channels": 16,
    "dim": 48,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 40,
    "axes_dims": (4, 6, 6),
    "axes_lens": (256, 64, 64),
}
_QWEN3 = {
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
_CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen's, without tools and without what was thought before."""
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
    "z-image-small": Size("ZImagePipeline", _Z_IMAGE, {"shift": 3.0}, vae=_FLUX_VAE),
    "flux-control-small": Size(
        "FluxControlPipeline",
        {**_FLUX, "guidance_embeds": True, "in_channels": 128, "out_channels": 64},
        _SHIFTING,
        vae=_FLUX_VAE,
    ),
}


def make(size: str, out: Path, seed: int = 0, texts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write a diffusers folder of the given size to `out`. texts: configurations of text encoders, by suffix."""
    import diffusers
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5EncoderModel,
    )

    asked = SIZES[size]
    torch.manual_seed(seed)
    of_flux, of_z_image = (asked.pipeline.startswith(name) for name in ("Flux", "ZImage"))
    tokenizer = _tokenizer(1000, "<|endoftext|>")
    ids = _special_ids(tokenizer)
    parts: dict[str, Any] = {}

    def drawn(model: Any) -> Any:
        _draw(model.requires_grad_(False))
        return model.eval()

    def clip(kind: Any, suffix: str, **options: Any) -> None:
        own = (texts or {}).get(suffix, {})
        config = CLIPTextConfig(vocab_size=1000, max_position_embeddings=77, **{**ids, **_TEXT, **options, **own})
        parts["tokenizer" + suffix], parts["text_encoder" + suffix] = tokenizer, drawn(kind(config))

    def t5(suffix: str) -> None:
        own = _unigram()
        parts["tokenizer" + suffix] = own
        options = {**_T5, **(texts or {}).get(suffix, {})}
        parts["text_encoder" + suffix] = drawn(T5EncoderModel(T5Config(vocab_size=len(own), **options)))

    if of_z_image:
        parts["tokenizer"] = own = _chat()
        config = Qwen3Config(vocab_size=len(own), **_QWEN3)
        parts["text_encoder"] = drawn(Qwen3ForCausalLM(config))
    elif of_flux:
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
    kind = diffusers.ZImageTransformer2DModel if of_z_image else kind
    options = dict(asked.transformer) | ({"joint_attention_dim": 4096, "pooled_projection_dim": 768} if texts else {})
    parts["transformer"] = drawn(kind(**options))
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
        theirs = of_z_image or (of_flux and name != "text_encoder")
        if (out / name / "model.safetensors").exists() and not theirs:
            name_as_of_old(out / name)


CONTROLNETS: dict[str, dict[str, dict[str, Any]]] = {
    "sd3": {
        "edge": {"num_layers": 3},
        "edge2": {"num_layers": 3},
        "depth": {"num_layers": 2, "force_zeros_for_pooled_projection": False},
        "inpaint": {"num_layers": 1, "extra_conditioning_channels": 1},
        # as the first ones of Stable Diffusion 3.5's large model
        "borrowing": {"num_layers": 2, "joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None},
    },
    "flux": {
        "edge": {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True},
        "depth": {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True},
        "union": {"num_layers": 2, "num_single_layers": 0, "num_mode": 10, "guidance_embeds": True},
        "pixels": {
            "num_layers": 2,
            "num_single_layers": 0,
            "guidance_embeds": True,
            "conditioning_embedding_channels": 16,
            "patch_size": 2,
        },
    },
}
"""Kinds of ControlNets of Stable Diffusion 3 and of FLUX.1: what is not as in the transformer."""


def make_controlnet(transformer: Mapping[str, Any], out: Path, kind: str = "edge") -> None:
    """Write the diffusers folder of a ControlNet with random weights to `out`.

    transformer: the configuration of the transformer that it is for. kind: of `CONTROLNETS`.
    """
    import inspect

    import diffusers
    import torch

    of_flux = transformer["_class_name"] == "FluxTransformer2DModel"
    made: Any = diffusers.FluxControlNetModel if of_flux else diffusers.SD3ControlNetModel
    kinds = CONTROLNETS["flux" if of_flux else "sd3"]
    torch.manual_seed(1000 + list(kinds).index(kind))
    known = inspect.signature(made.__init__).parameters
    options = {name: value for name, value in transformer.items() if name in known and name != "guidance_embeds"}
    model = made(**{**options, **kinds[kind]})
    _draw(model.requires_grad_(False))
    for name, parameter in model.named_parameters():
        if name.startswith(("controlnet_blocks", "controlnet_single_blocks")):
            parameter *= 0.3  # residuals are smaller than the streams that they are added to
    model.eval().save_pretrained(out)


def make_ip_adapter(transformer: Mapping[str, Any], out: Path, seed: int = 0) -> None:
    """Write `ip_adapter.safetensors` with random weights, and the folder of its image encoder, to `out`.

    transformer: the configuration of the transformer that it is for: of FLUX.1 the names are XLabs', and the encoder is
    CLIP's; of Stable Diffusion 3 they are InstantX's, and the encoder is SigLIP's.
    """
    import torch
    from safetensors.torch import save_file

    of_flux = transformer["_class_name"] == "FluxTransformer2DModel"
    torch.manual_seed(4000)
    made = (_of_flux if of_flux else _of_sd3)(transformer, out)  # the encoder is the same for every seed
    torch.manual_seed(4000 + seed)
    tensors = {}
    for name, shape in made.items():
        spread = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = torch.randn(shape) * spread + float(is_norm)
    save_file(tensors, out / "ip_adapter.safetensors", metadata={"format": "pt"})


def _of_flux(transformer: Mapping[str, Any], out: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights, whose encoder is written."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    seen = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPVisionConfig(**seen, image_size=32, patch_size=8, projection_dim=24)
    encoder = CLIPVisionModelWithProjection(config)
    _draw(encoder.requires_grad_(False))
    encoder.save_pretrained(out / "image_encoder")
    inner = int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])
    text, tokens = int(transformer["joint_attention_dim"]), 4
    found: dict[str, tuple[int, ...]] = {
        "proj.weight": (tokens * text, 24),
        "proj.bias": (tokens * text,),
        "norm.weight": (text,),
        "norm.bias": (text,),
    }
    found = {f"ip_adapter_proj_model.{name}": shape for name, shape in found.items()}
    for i, part in itertools.product(range(int(transformer["num_layers"])), "kv"):
        name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{part}_proj"
        found |= {f"{name}.weight": (inner, text), f"{name}.bias": (inner,)}
    return found


def _of_sd3(transformer: Mapping[str, Any], out: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights, whose encoder is written."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    seen = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    encoder = SiglipVisionModel(SiglipVisionConfig(**seen, image_size=32, patch_size=8))
    _draw(encoder.requires_grad_(False))
    encoder.save_pretrained(out / "image_encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(out / "image_encoder")
    head = int(transformer["attention_head_dim"])
    inner, hidden, time, tokens = int(transformer["num_attention_heads"]) * head, 64, 32, 5
    block = {
        **{f"0.{name}.{part}": (hidden,) for name in ("norm1", "norm2") for part in ("weight", "bias")},
        "0.to_q.weight": (64, hidden),
        "0.to_kv.weight": (128, hidden),
        "0.to_out.weight": (hidden, 64),
        "1.0.weight": (hidden,),
        "1.0.bias": (hidden,),
        "1.1.weight": (4 * hidden, hidden),
        "1.3.weight": (hidden, 4 * hidden),
        "2.1.weight": (4 * hidden, hidden),
        "2.1.bias": (4 * hidden,),
    }
    found: dict[str, tuple[int, ...]] = {
        "latents": (1, tokens, hidden),
        "time_embedding.linear_1.weight": (hidden, time),
        "time_embedding.linear_1.bias": (hidden,),
        "time_embedding.linear_2.weight": (hidden, hidden),
        "time_embedding.linear_2.bias": (hidden,),
        "proj_in.weight": (hidden, 32),
        "proj_in.bias": (hidden,),
        "proj_out.weight": (inner, hidden),
        "proj_out.bias": (inner,),
        "norm_out.weight": (inner,),
        "norm_out.bias": (inner,),
        **{f"layers.{i}.{name}": shape for i in range(4) for name, shape in block.items()},
    }
    found = {f"image_proj.{name}": shape for name, shape in found.items()}
    doubled = transformer.get("dual_attention_layers") or ()
    for i in range(int(transformer["num_layers"]) + len(doubled)):
        layer: dict[str, tuple[int, ...]] = {
            "norm_ip.linear.weight": (2 * inner, hidden),
            "norm_ip.linear.bias": (2 * inner,),
            "to_k_ip.weight": (inner, inner),
            "to_v_ip.weight": (inner, inner),
            **{f"{norm}.weight": (head,) for norm in ("norm_q", "norm_k", "norm_ip_k")},
        }
        found |= {f"ip_adapter.{i}.{name}": shape for name, shape in layer.items()}
    return found


_LARGE = {
    **_FLUX,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": True,
}


def make_large(out: Path, layers: int, single_layers: int, seed: int = 0) -> None:
    """Write a diffusers folder of the widths of FLUX.1 [dev] and so many layers to `out`."""
    import diffusers
    import torch

    from ..export.shards import write_shards

    config = {**_LARGE, "num_layers": layers, "num_single_layers": single_layers}
    texts: dict[str, dict[str, Any]] = {
        "": {**_TEXT, "hidden_size": 768, "num_attention_heads": 12},
        "_2": {**_T5, "d_model": 4096},
    }
    make("flux-dev-small", out, seed, texts)
    shutil.rmtree(out / "transformer")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**config)
    model.save_config(out / "transformer")
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in model.state_dict().items():
            spread = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
            values = torch.randn(weight.shape, generator=generator, dtype=torch.float32) * spread
            yield name, (values + float(weight.ndim == 1 and name.endswith("weight"))).to(torch.bfloat16)

    write_shards(out / "transformer", "diffusion_pytorch_model", drawn())


def _unigram() -> Any:
    """A tokenizer of T5's kind, whose pieces are letters and a few words."""
    from transformers import T5TokenizerFast

    words = ("a", "large", "small", "red", "star", "ring", "on", "the", "left", "navy", "background")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words), *string.ascii_lowercase, *",.'-"]
    scores = {f"▁{word}": -2.0 for word in words}
    return T5TokenizerFast(vocab=[(piece, scores.get(piece, -5.0)) for piece in pieces], extra_ids=0)


def _chat() -> Any:
    """A tokenizer of Qwen's kind, of bytes and pairs of letters, with a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    merges = list(itertools.product(string.ascii_lowercase, repeat=2))
    pieces = [*sorted(ByteLevel.alphabet()), *map("".join, merges)]
    return Qwen2TokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT,
    )


@click.command()
@click.argument("size", type=click.Choice([*SIZES, "flux-dev"]))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=19, show_default=True, help="Of flux-dev, those with two streams.")
@click.option("--single-layers", default=38, show_default=True, help="Of flux-dev, those with one.")
def main(size: str, out: Path, layers: int, single_layers: int) -> None:
    """Write a checkpoint with random weights."""
    if size == "flux-dev":
        make_large(out, layers, single_layers)
    else:
        make(size, out)


if __name__ == "__main__":
    main()
