"""Checkpoints of real topology with random weights, for latency, memory and tests of parity.

    python -m diffoundry.examples.random_checkpoint sd15 build/sd15

`sd15`, `sdxl` and `sdxl-refiner` have the published sizes (4.2 GB; 6.9 GB and 6.1 GB in float16). The names that end in
-small have the topology of a published family, with its scheduler, and small widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SD_SCHEDULER = {**_BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
_PNDM_SCHEDULER = {**_SD_SCHEDULER, "skip_prk_steps": True}
_SDXL_SCHEDULER = {**_PNDM_SCHEDULER, "interpolation_type": "linear", "timestep_spacing": "leading"}
_TURBO_SCHEDULER = {**_PNDM_SCHEDULER, "timestep_spacing": "trailing"}
_LCM_SCHEDULER = {
    **_SD_SCHEDULER,
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
}

_SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
_SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_REFINER_BLOCKS = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_INPAINT = 9
"""Channels of an inpainting U-Net: the latents, the mask, the latents of the masked image."""
_PUBLISHED_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
"""What published text encoders say, though the tokens differ; transformers then pools at the largest token of a row."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a checkpoint is made of.

    text, text_2: of the text encoders; empty for none. components: further arguments of the pipeline.
    scaled: draw the weights by fan-in, so that every input shows in the outputs, rather than as the libraries do.
    """

    text: Mapping[str, Any]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_2: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "DDIMScheduler"
    scheduler_options: Mapping[str, Any] = field(default_factory=lambda: dict(_SD_SCHEDULER))
    vocabulary: int = 1000
    pad_token: str = "<|endoftext|>"
    pipeline: str = "StableDiffusionPipeline"
    components: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = True
    half: bool = False


_NO_SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

_SD15 = Size(
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    unet={
        **_SD_BLOCKS,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 64,
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    scheduler="PNDMScheduler",
    scheduler_options=_PNDM_SCHEDULER,
    vocabulary=49408,
    components=_NO_SAFETY,
    scaled=False,
)
_SD15_SMALL = replace(
    _SD15,
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    unet={
        **_SD_BLOCKS,
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "sample_size": 16,
        "norm_num_groups": 8,
    },
    vae={"block_out_channels": (16, 16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8},
    scheduler="DDIMScheduler",
    scheduler_options=_SD_SCHEDULER,
    vocabulary=1000,
)
_SD2_SMALL = replace(
    _SD15_SMALL,
    text={
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    },
    unet={
        **_SD_BLOCKS,
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": (2, 4, 4, 4),
        "cross_attention_dim": 48,
        "sample_size": 12,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    },
    vae={"block_out_channels": (16, 32, 32, 32), "layers_per_block": 2, "norm_num_groups": 8},
    scheduler_options={**_SD_SCHEDULER, "prediction_type": "v_prediction"},
    pad_token="!",
)

_SHALLOW = {"layers_per_block": 1, "sample_size": 8}
_SHALLOW_VAE = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
_SD15_SHALLOW = replace(_SD15_SMALL, unet={**_SD15_SMALL.unet, **_SHALLOW}, vae=_SHALLOW_VAE, scaled=True)
_SD2_SHALLOW = replace(_SD2_SMALL, unet={**_SD2_SMALL.unet, **_SHALLOW}, vae=_SHALLOW_VAE, scaled=True)

_SDXL = Size(
    text=_SD15.text,
    text_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        **_PUBLISHED_IDS,
    },
    unet={
        **_SDXL_BLOCKS,
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        "sample_size": 128,
    },
    vae={**_SD15.vae, "scaling_factor": 0.13025, "force_upcast": True},
    scheduler="EulerDiscreteScheduler",
    scheduler_options=_SDXL_SCHEDULER,
    vocabulary=49408,
    pipeline="StableDiffusionXLPipeline",
    components={"force_zeros_for_empty_prompt": True},
    half=True,
)
_REFINER = replace(
    _SDXL,
    text={},
    unet={
        **_REFINER_BLOCKS,
        "layers_per_block": 2,
        "transformer_layers_per_block": 4,
        "block_out_channels": (384, 768, 1536, 1536),
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 5 * 256 + 1280,
        "sample_size": 128,
    },
    pipeline="StableDiffusionXLImg2ImgPipeline",
    components={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
)
_SDXL_SMALL = replace(
    _SDXL,
    text=_SD15_SMALL.text,
    text_2={
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "projection_dim": 40,
    },
    unet={
        **_SDXL_BLOCKS,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "block_out_channels": (16, 32, 32),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 32 + 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
        "sample_size": 8,
        "norm_num_groups": 8,
    },
    vae={**_SHALLOW_VAE, "scaling_factor": 0.13025, "force_upcast": True},
    vocabulary=1000,
    half=False,
)
_REFINER_SMALL = replace(
    _SDXL_SMALL,
    text={},
    text_2={**_SDXL_SMALL.text_2, **_PUBLISHED_IDS},
    unet={
        **_REFINER_BLOCKS,
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "block_out_channels": (16, 32, 32, 32),
        "attention_head_dim": (1, 2, 4, 4),
        "cross_attention_dim": 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 5 * 8 + 40,
        "sample_size": 8,
        "norm_num_groups": 8,
    },
    pipeline=_REFINER.pipeline,
    components=_REFINER.components,
)

SIZES: dict[str, Size] = {
    "sd15": _SD15,
    "sd15-small": _SD15_SMALL,
    "sd2-small": _SD2_SMALL,
    "sd15-inpaint-small": replace(
        _SD15_SHALLOW,
        unet={**_SD15_SHALLOW.unet, "in_channels": _INPAINT},
        scheduler="PNDMScheduler",
        scheduler_options=_PNDM_SCHEDULER,
        pipeline="StableDiffusionInpaintPipeline",
    ),
    "sd2-inpaint-small": replace(
        _SD2_SHALLOW,
        unet={**_SD2_SHALLOW.unet, "in_channels": _INPAINT},
        scheduler="PNDMScheduler",
        scheduler_options=_PNDM_SCHEDULER,
        pipeline="StableDiffusionInpaintPipeline",
    ),
    "lcm-small": replace(
        _SD15_SHALLOW,
        unet={**_SD15_SHALLOW.unet, "time_cond_proj_dim": 16},
        scheduler="LCMScheduler",
        scheduler_options=_LCM_SCHEDULER,
        pipeline="LatentConsistencyModelPipeline",
    ),
    "turbo-small": replace(_SD2_SHALLOW, scheduler="EulerDiscreteScheduler", scheduler_options=_TURBO_SCHEDULER),
    "sdxl": _SDXL,
    "sdxl-small": _SDXL_SMALL,
    "sdxl-inpaint-small": replace(
        _SDXL_SMALL,
        unet={**_SDXL_SMALL.unet, "in_channels": _INPAINT},
        pipeline="StableDiffusionXLInpaintPipeline",
    ),
    "lcm-sdxl-small": replace(
        _SDXL_SMALL,
        unet={**_SDXL_SMALL.unet, "time_cond_proj_dim": 16},
        scheduler="LCMScheduler",
        scheduler_options=_LCM_SCHEDULER,
    ),
    "sdxl-turbo-small": replace(
        _SDXL_SMALL, scheduler="EulerAncestralDiscreteScheduler", scheduler_options=_TURBO_SCHEDULER
    ),
    "sdxl-refiner": _REFINER,
    "sdxl-refiner-small": _REFINER_SMALL,
}


def make(size: str, out: Path, seed: int = 0) -> None:
    """Write a diffusers folder of the given size to `out`."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    asked = SIZES[size]
    torch.manual_seed(seed)
    drawn = asked.scaled, asked.half
    of_sdxl = "XL" in asked.pipeline
    parts: dict[str, Any] = {}
    for suffix, text, kind, pad in (
        ("", asked.text, CLIPTextModel, asked.pad_token),
        ("_2", asked.text_2, CLIPTextModelWithProjection, "!"),
    ):
        if text:
            tokenizer = _tokenizer(asked.vocabulary, pad)
            config = CLIPTextConfig(
                vocab_size=asked.vocabulary,
                max_position_embeddings=77,
                **{**_special_ids(tokenizer), **text},
            )
            parts["tokenizer" + suffix] = tokenizer
            parts["text_encoder" + suffix] = _model(kind, *drawn, config)
        elif of_sdxl:
            parts |= {"tokenizer" + suffix: None, "text_encoder" + suffix: None}
    parts["unet"] = _model(diffusers.UNet2DConditionModel, *drawn, out_channels=4, **{"in_channels": 4, **asked.unet})
    parts["vae"] = _model(
        diffusers.AutoencoderKL,
        *drawn,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=8 * asked.unet["sample_size"],
        **asked.vae,
    )
    scheduler = getattr(diffusers, asked.scheduler).from_config(dict(asked.scheduler_options))
    pipeline = getattr(diffusers, asked.pipeline)(**parts, scheduler=scheduler, **asked.components)
    pipeline.save_pretrained(out)
    for folder in ("text_encoder", "text_encoder_2"):
        if parts.get(folder) is not None:
            name_as_of_old(out / folder)


def make_controlnet(unet: Mapping[str, Any], out: Path, seed: int = 0, *, scaled: bool = True, modes: int = 0) -> None:
    """Write the diffusers folder of a ControlNet with random weights to `out`.

    unet: the configuration of the U-Net that it is for. scaled: see `Size`. modes: of a ControlNet-Union.
    """
    import inspect

    import diffusers
    import torch

    torch.manual_seed(1000 + seed)
    kind = diffusers.ControlNetUnionModel if modes else diffusers.ControlNetModel
    known = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in unet.items() if name in known and name != "in_channels"}
    if modes:
        width = unet["block_out_channels"][0]
        options |= {"num_control_type": modes, "num_trans_channel": width, "num_proj_channel": width}
        options["addition_time_embed_dim"] = unet.get("addition_time_embed_dim") or 8
    blocks = (16, 16, 32, 32) if scaled else (16, 32, 96, 256)
    model = _model(kind, scaled, False, in_channels=4, conditioning_embedding_out_channels=blocks, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not scaled and name.startswith(_ZERO):  # as it is before a training
                parameter.normal_(0.0, 0.02)
            elif scaled and name.startswith(_ZERO[:2]):
                parameter *= 0.3  # residuals are smaller than the streams that they are added to
    model.save_pretrained(out)


def make_union(unet: Mapping[str, Any], out: Path, seed: int = 0) -> None:
    """Write the diffusers folder of a ControlNet-Union of 6 modes with random weights to `out`."""
    make_controlnet(unet, out, seed, modes=6)


def make_t2i_adapter(unet: Mapping[str, Any], out: Path, seed: int = 0, *, light: bool = False) -> None:
    """Write the diffusers folder of a T2I-Adapter with random weights to `out`. unet: the configuration it is for.

    light: of the light kind, as the published one for colours.
    """
    import diffusers
    import torch

    from ..families.control import intrablocks

    torch.manual_seed(3000 + seed)
    is_xl = len(unet["block_out_channels"]) < 4
    channels = [skip.channels for _, skip in intrablocks(unet)]
    kind, factor = ("full_adapter_xl", 16) if is_xl else ("full_adapter", 8)
    if light:
        kind, channels = "light_adapter", channels[:-1]
    model: Any = diffusers.T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    model.save_pretrained(out)


def make_ip_adapter(unet: Mapping[str, Any], out: Path, kind: str = "plain", seed: int = 0) -> None:
    """Write `ip_adapter.safetensors` with random weights, and the folder of its image encoder, to `out`.

    unet: the configuration of the U-Net that it is for. kind: `plain`, `plus`, `full` or `face`.
    """
    import diffusers
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(2000 + seed)
    seen, inner, width = 32, 64, int(unet["cross_attention_dim"])
    config = CLIPVisionConfig(
        hidden_size=seen,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    encoder: Any = _model(CLIPVisionModelWithProjection, True, False, config)
    encoder.save_pretrained(out / "image_encoder")
    shapes: dict[str, tuple[int, ...]] = {
        "plain": {
            "proj.weight": (4 * width, 24),
            "proj.bias": (4 * width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        },
        "face": {
            "proj.0.weight": (2 * 20, 20),
            "proj.0.bias": (2 * 20,),
            "proj.2.weight": (3 * width, 2 * 20),
            "proj.2.bias": (3 * width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        },
        "full": {
            "proj.0.weight": (seen, seen),
            "proj.0.bias": (seen,),
            "proj.2.weight": (width, seen),
            "proj.2.bias": (width,),
            "proj.3.weight": (width,),
            "proj.3.bias": (width,),
        },
        "plus": {
            "latents": (1, 3, inner),
            "proj_in.weight": (inner, seen),
            "proj_in.bias": (inner,),
            "proj_out.weight": (width, inner),
            "proj_out.bias": (width,),
            "norm_out.weight": (width,),
            "norm_out.bias": (width,),
            **{f"layers.{i}.{name}": shape for i in range(4) for name, shape in _resampler(inner).items()},
        },
    }[kind]
    tensors = {}
    for name, shape in shapes.items():
        spread = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensors[f"image_proj.{name}"] = torch.randn(shape) * spread + float(is_norm)
    with torch.device("meta"):
        model: Any = diffusers.UNet2DConditionModel.from_config(dict(unet))
    crosses = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(crosses):
        channels = model.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * i + 1}.{part}.weight"] = torch.randn(channels, width) * width**-0.5
    save_file(tensors, out / "ip_adapter.safetensors", metadata={"format": "pt"})


def _resampler(inner: int) -> dict[str, tuple[int, ...]]:
    """The weights of one layer of the resampler of an IP-Adapter Plus, as published ones name them."""
    norms = {f"0.{name}.{part}": (inner,) for name in ("norm1", "norm2") for part in ("weight", "bias")}
    return {
        **norms,
        "0.to_q.weight": (64, inner),
        "0.to_kv.weight": (128, inner),
        "0.to_out.weight": (inner, 64),
        "1.0.weight": (inner,),
        "1.0.bias": (inner,),
        "1.1.weight": (4 * inner, inner),
        "1.3.weight": (inner, 4 * inner),
    }


def _model(kind: Any, scaled: bool, half: bool, *arguments: Any, **options: Any) -> torch.nn.Module:
    """A model of the class `kind`, its weights drawn as `Size` says."""
    import torch

    if not scaled:
        model: torch.nn.Module = kind(*arguments, **options)
        return model.eval()
    with torch.device("meta"):
        model = kind(*arguments, **options)
    torch.nn.Module.to(model, torch.float16 if half else torch.float32)
    _draw(model.to_empty(device="cpu").requires_grad_(False))
    return model.eval()


def _draw(model: torch.nn.Module) -> None:
    """Fill the parameters so that variances neither vanish nor grow with the width, and norms and biases do something.

    What is added to a residual stream is smaller than the stream, so that rounding is not magnified from block to
    block; what the timestep and the added conditions say is larger, so that it shows.
    """
    gains = {
        "conv2": 0.5,
        "to_out.0": 0.5,
        "net.2": 0.5,
        "out_proj": 0.5,
        "fc2": 0.5,
        "time_emb_proj": 2.0,
    }
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        if parameter.ndim == 1:
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
        elif layer.endswith(("token_embedding", "position_embedding")):
            parameter.normal_(0.0, 0.7)
        else:
            gain = next((gains[end] for end in gains if layer.endswith(end)), 1.0)
            parameter.normal_(0.0, gain * parameter[0].numel() ** -0.5)


def _tokenizer(tokens: int, pad_token: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(**_vocabulary(tokens), pad_token=pad_token, model_max_length=77)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    return {name: int(getattr(tokenizer, name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def name_as_of_old(folder: Path) -> None:
    """Give the weights of a saved CLIP text encoder the names of published checkpoints.

    transformers 5 writes them without the prefix `text_model.`, and transformers 4 then silently draws new ones.
    """
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    old = ("text_model.", "text_projection.")
    named = {name if name.startswith(old) else old[0] + name: tensor for name, tensor in tensors.items()}
    save_file(named, path, metadata={"format": "pt"})


def _vocabulary(count: int) -> dict[str, Any]:
    """Byte-level tokens, made-up merges up to `count`, and CLIP's two special tokens last."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    letters = [letter for letter in alphabet if letter.isascii() and letter.islower()]
    pairs = [(a, b) for a in letters for b in letters] + [(a, b + "</w>") for a in letters for b in letters]
    triples = [(a + b, c) for a, b in pairs[: len(letters) ** 2] for c in letters]
    merges = (pairs + triples)[: max(count - len(tokens) - 2, 0)]
    tokens += [a + b for a, b in merges]
    tokens += [f"<unused{i}>" for i in range(count - len(tokens) - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


_ZERO = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
"""The weights of a ControlNet that are zero before a training."""


@click.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--controlnet", is_flag=True, help="A ControlNet for such checkpoints, in place of one.")
def main(size: str, out: Path, seed: int, controlnet: bool) -> None:
    """Write a checkpoint of SIZE with random weights to OUT."""
    if controlnet:
        make_controlnet(SIZES[size].unet, out, seed, scaled=SIZES[size].scaled)
    else:
        make(size, out, seed)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
