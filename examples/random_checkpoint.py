"""Checkpoints of real topology with random weights, for latency, memory and tests of parity.

    python -m diffoundry.examples.random_checkpoint sd15 build/sd15

`sd15` has the size of Stable Diffusion 1.5 (4.2 GB); `sd15-small` and `sd2-small` have the topology of Stable Diffusion
1.x and 2.x (v_prediction, linear projections, per-level head counts, another padding token) with small widths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

SIZES: dict[str, dict[str, Any]] = {
    "sd15": {
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "unet": {
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "sample_size": 64,
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "scheduler": {"skip_prk_steps": True},
        "vocabulary": 49408,
    },
    "sd15-small": {
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "unet": {
            "block_out_channels": (32, 32, 64, 64),
            "attention_head_dim": 8,
            "cross_attention_dim": 32,
            "sample_size": 16,
            "norm_num_groups": 8,
        },
        "vae": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8},
        "scheduler": {},
        "vocabulary": 1000,
    },
    "sd2-small": {
        "text": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "hidden_act": "gelu",
        },
        "unet": {
            "block_out_channels": (32, 32, 64, 64),
            "attention_head_dim": (2, 4, 4, 4),
            "cross_attention_dim": 48,
            "sample_size": 12,
            "norm_num_groups": 8,
            "use_linear_projection": True,
        },
        "vae": {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 2, "norm_num_groups": 8},
        "scheduler": {"prediction_type": "v_prediction"},
        "vocabulary": 1000,
        "pad_token": "!",
    },
}


def make(size: str, out: Path, seed: int = 0) -> None:
    """Write a diffusers folder of the given size to `out`."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    shape = SIZES[size]
    torch.manual_seed(seed)
    tokens = shape["vocabulary"]
    tokenizer = CLIPTokenizer(
        **_vocabulary(tokens), pad_token=shape.get("pad_token", "<|endoftext|>"), model_max_length=77
    )
    ids = {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokenizer.pad_token_id}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=tokens, max_position_embeddings=77, **ids, **shape["text"]))
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **_SD_BLOCKS, **shape["unet"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=8 * shape["unet"]["sample_size"],
        **shape["vae"],
    )
    scheduler = (PNDMScheduler if "skip_prk_steps" in shape["scheduler"] else DDIMScheduler).from_config(
        {**_SCHEDULER, **shape["scheduler"]}
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    name_as_of_old(out / "text_encoder")


def name_as_of_old(folder: Path) -> None:
    """Give the weights of a saved CLIP text encoder the names of published checkpoints.

    transformers 5 writes them without the prefix `text_model.`, and transformers 4 then silently draws new ones.
    """
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    prefix = "text_model."
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in tensors.items()}
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


@click.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(size: str, out: Path, seed: int) -> None:
    """Write a checkpoint of SIZE with random weights to OUT."""
    make(size, out, seed)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
