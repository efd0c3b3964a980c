"""The configurations of a single-file checkpoint: what shapes tell, and the rules of its family for the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError
from ..checkpoint import Checkpoint
from .kinds import REFINER, SD1, SD2, SDXL, UNET, VAE, Family, TextEncoder
from .stated import check_architecture, prediction_type, zero_snr
from .tokenizer import TOKENS
from .weights import Weights

Config = dict[str, Any]

COND_PROJ = "time_embed.cond_proj.weight"
"""The guidance embedding of LCM, for which the original code has no name: this is the usual one."""

_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_CHANNELS_A_GROUP_NORM = 32
_CHANNELS_A_HEAD = 64
_DIGITS = 9
"""Of an index in a name; Python refuses to read thousands of them."""
_SD2_BASE_STEPS = 875_000
"""The training step of Stable Diffusion 2 base, by which diffusers knows that it predicts the noise."""
_SD2_LAYERS = 23
"""Layers of OpenCLIP ViT-H that Stable Diffusion 2 runs; the file also holds the last one, which it does not."""
_NOISE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_EULER = {
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


@dataclass(frozen=True, slots=True)
class Part:
    """The shapes below one prefix of a file."""

    path: Path
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, weights: Weights, prefix: str) -> Part:
        """The tensors of `weights` whose names begin with `prefix`, which is cut off."""
        names = {name: shape for name, shape in weights.shapes.items() if name.startswith(prefix)}
        return cls(weights.path, prefix, {name.removeprefix(prefix): shape for name, shape in names.items()})

    def size(self, axis: int, *names: str) -> int:
        """The size along `axis` of the first of `names` that is there. Raises `CheckpointError` for none."""
        shape = next((self.shapes[name] for name in names if name in self.shapes), None)
        if shape is None:
            raise CheckpointError(
                f"{self.path} lacks {self.prefix}{names[0]}, which tells its size: it is incomplete, download it again"
            )
        if len(shape) <= axis:
            raise CheckpointError(f"{self.path}: {self.prefix}{names[0]} has the shape {list(shape)}: it is damaged")
        return shape[axis]

    def indices(self, pattern: str) -> list[int]:
        """The distinct integers that the group of `pattern` finds at the beginning of names."""
        found = (re.match(pattern, name) for name in self.shapes)
        return sorted({int(match[1][:_DIGITS]) for match in found if match})

    def count(self, pattern: str) -> int:
        """One more than the largest of `indices`. Raises `CheckpointError` for more than there are tensors."""
        count = max(self.indices(pattern), default=-1) + 1
        if count > len(self.shapes):
            raise self.unknown(f"{self.prefix}* counts to {count - 1} with {len(self.shapes)} tensors")
        return count

    def unknown(self, what: str) -> CheckpointError:
        """The error for what neither shapes nor the family tell."""
        return CheckpointError(
            f"{self.path}: {what}, so its configuration cannot be told: "
            "give the diffusers folder of a checkpoint of the same make as the configuration"
        )


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a diffusers folder says beside its weights and tokenizers.

    pipeline: the pipeline class. flags: of model_index.json. models: the configuration of each model by its folder.
    """

    pipeline: str
    flags: dict[str, Any]
    models: dict[str, Config]
    scheduler: Config


def built_in(weights: Weights, family: Family, predicts: str | None) -> Setup:
    """The setup that shapes and the family's rules give. Raises `CheckpointError` when they do not tell it.

    predicts: the prediction type, instead of what the file says or is taken for.
    """
    check_architecture(weights, family)
    vae = vae_config(weights, family)
    in_channels = Part.of(weights, UNET).size(1, "input_blocks.0.0.weight")
    pipeline = _pipeline(weights, family, in_channels, vae["latent_channels"])
    predicts = predicts or _prediction(weights, family, pipeline)
    # 768-v, as published, works on larger pictures and needs its attention scores in float32.
    late = family is SD2 and predicts == "v_prediction"
    vae["sample_size"] = pixels = 768 if late else family.pixels
    unet = {**unet_config(weights, family), "upcast_attention": late}
    unet["sample_size"] = pixels // 2 ** (len(vae["block_out_channels"]) - 1)
    texts = {text.name: text_config(weights, family, text) for text in family.text_encoders}
    return Setup(
        pipeline,
        dict(family.flags),
        {**texts, "unet": unet, "vae": vae},
        _scheduler(weights, family, pipeline, predicts),
    )


def setup_of(folder: Path, family: Family, predicts: str | None) -> Setup:
    """The setup of the diffusers folder `folder`. Raises `CheckpointError` when it is not of `family`.

    predicts: the prediction type, instead of the scheduler's.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: the configuration must be a folder in the diffusers layout")
    checkpoint = Checkpoint.open(folder)
    index = checkpoint.index
    texts = [text.name for text in family.text_encoders]
    named = sorted(name for name, part in index.items() if name.startswith("text_encoder") and part != [None, None])
    if named != texts:
        raise CheckpointError(
            f"the configuration {folder} has {' and '.join(named) or 'no text encoder'}, the weights are of "
            f"{family.title}, which has {' and '.join(texts)}: give a folder of that family"
        )
    flags = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    if "requires_safety_checker" in flags:
        flags["requires_safety_checker"] = False
    due = {**{text.name: text.class_name for text in family.text_encoders}, **_CLASSES}
    for name, kind in due.items():
        stated = (index.get(name) or [None, None])[1]
        if stated != kind:
            raise CheckpointError(
                f"the configuration {folder} has {stated} for its {name}, a single file of {family.title} holds "
                f"{kind}: give a folder that has it"
            )
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    # The index decides, as in diffusers, where the two name different classes.
    scheduler["_class_name"] = (index.get("scheduler") or [None, None])[1] or scheduler.get("_class_name")
    if predicts:
        scheduler["prediction_type"] = predicts
    models = {name: checkpoint.config(name) for name in (*texts, "unet", "vae")}
    return Setup(checkpoint.class_name, flags, models, scheduler)


def unet_config(weights: Weights, family: Family) -> Config:
    """The U-Net's configuration, spelt as `UNet2DConditionModel` spells it. Raises `CheckpointError`."""
    part = Part.of(weights, UNET)
    count = part.count(r"input_blocks\.(\d+)\.")
    every = gcd(*part.indices(r"input_blocks\.(\d+)\.0\.op\.")) or count  # blocks a level, the downsampler counted
    levels = -(-count // every)
    starts = [level * every + 1 for level in range(levels)]
    widths = [
        part.size(0, f"input_blocks.{i}.0.out_layers.3.weight", f"input_blocks.{i}.0.in_layers.2.weight")
        for i in starts
    ]
    down = [[_depth(part, f"input_blocks.{i + j}.1.") for j in range(every - 1)] for i in starts]
    up = [[_depth(part, f"output_blocks.{level * every + j}.1.") for j in range(every)] for level in range(levels)]
    attentive = [any(a) or any(b) for a, b in zip(down, reversed(up), strict=True)]
    attention = next((name for name in sorted(part.shapes) if name.endswith(".attn2.to_k.weight")), None)
    if attention is None:
        raise part.unknown("its U-Net has no cross-attention")
    projection = attention.split(".transformer_blocks.")[0] + ".proj_in.weight"
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": family.heads or [_heads(part, width) for width in widths],
        "block_out_channels": [_grouped(part, width) for width in widths],
        "cross_attention_dim": part.size(1, attention),
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attentive],
        "in_channels": part.size(1, "input_blocks.0.0.weight"),
        "layers_per_block": every - 1,
        "norm_num_groups": _CHANNELS_A_GROUP_NORM,
        "out_channels": part.size(0, "out.2.weight"),
        "time_cond_proj_dim": part.size(1, COND_PROJ) if COND_PROJ in part.shapes else None,
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attentive)],
        "use_linear_projection": len(part.shapes.get(projection, ())) == 2,
        **_transformers(part, down, up),
        **(_sizes(weights, part, family) if family.sizes else {}),
    }


def _depth(part: Part, block: str) -> int:
    return part.count(re.escape(block) + r"transformer_blocks\.(\d+)\.")


def _heads(part: Part, width: int) -> int:
    if width % _CHANNELS_A_HEAD:
        raise part.unknown(f"{width} channels are no multiple of {_CHANNELS_A_HEAD}, the channels of a head")
    return width // _CHANNELS_A_HEAD


def _grouped(part: Part, width: int) -> int:
    if width % _CHANNELS_A_GROUP_NORM:
        raise part.unknown(f"{width} channels do not divide into the {_CHANNELS_A_GROUP_NORM} groups of a norm")
    return width


def _transformers(part: Part, down: list[list[int]], up: list[list[int]]) -> Config:
    """How many transformer blocks each attention has, as short as diffusers can say it.

    diffusers reads the depth of the middle off the last level, which is free where that level has no attention.
    An attention that a file lacks beside others of its level is taken to be as deep as they are, to be missed later.
    """

    def entry(depths: list[int], other: list[int], default: int = 1) -> int | list[int]:
        deepest = max(depths, default=0) or max(other)
        filled = [depth or deepest for depth in depths]
        return default if not deepest else deepest if set(filled) == {deepest} else filled

    # Distilled models keep one residual block of the middle, and no attention there.
    bare = part.count(r"middle_block\.(\d+)\.") == 1
    middle = _depth(part, "middle_block.1.") or 1
    levels = list(zip(down, reversed(up), strict=True))
    forth = [entry(a, b) for a, b in levels[:-1]] + [entry(*levels[-1], middle)]
    back = [entry(b, a) for a, b in levels]
    free = [not any(a) and not any(b) for a, b in levels]
    mirrored = all(a == b or none for a, b, none in zip(forth, back, free, strict=True))
    uneven = not mirrored or any(isinstance(value, list) for value in forth)
    return {
        "mid_block_type": "UNetMidBlock2D" if bare else "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": 1 if forth == [1] * len(forth) else forth,
        "reverse_transformer_layers_per_block": back[::-1] if uneven else None,
    }


def _sizes(weights: Weights, part: Part, family: Family) -> Config:
    """The embedding of the pooled text and of the numbers beside it (Podell et al. 2023, section 2.2)."""
    text = Part.of(weights, family.text_encoders[-1].prefix)
    width = part.size(1, "label_emb.0.0.weight")
    rest = width - text.size(1, "text_projection")
    if rest <= 0 or rest % (2 * family.sizes):
        raise part.unknown(f"{rest} channels do not divide into the embeddings of {family.sizes} numbers")
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": rest // family.sizes,
        "projection_class_embeddings_input_dim": width,
    }


def vae_config(weights: Weights, family: Family) -> Config:
    """The autoencoder's configuration, spelt as `AutoencoderKL` spells it. Raises `CheckpointError`."""
    part = Part.of(weights, VAE)
    levels = part.count(r"encoder\.down\.(\d+)\.")
    blocks = [f"encoder.down.{level}.block.0" for level in range(levels)]
    widths = [part.size(0, f"{block}.conv1.weight", f"{block}.conv2.weight") for block in blocks]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [_grouped(part, width) for width in widths],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": part.size(1, "encoder.conv_in.weight"),
        "latent_channels": part.size(1, "decoder.conv_in.weight"),
        "layers_per_block": part.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "norm_num_groups": _CHANNELS_A_GROUP_NORM,
        "out_channels": part.size(0, "decoder.conv_out.weight"),
        "scaling_factor": family.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in part.shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in part.shapes,
    }


def text_config(weights: Weights, family: Family, text: TextEncoder) -> Config:
    """A text encoder's configuration, spelt as `CLIPTextConfig` spells it. Raises `CheckpointError`."""
    part = Part.of(weights, text.prefix)
    tokens, positions, layer, up = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks", "mlp.c_fc")
        if text.open_clip
        else (
            "text_model.embeddings.token_embedding.weight",
            "text_model.embeddings.position_embedding.weight",
            "text_model.encoder.layers",
            "mlp.fc1",
        )
    )
    layers = part.count(re.escape(layer) + r"\.(\d+)\.")
    if family is SD2:
        # Files that were made from a diffusers folder lack the projection, and with it the last layer.
        layers = (
            _SD2_LAYERS if layers in (_SD2_LAYERS, _SD2_LAYERS + 1) else layers - ("text_projection" in part.shapes)
        )
    width, vocabulary = part.size(1, tokens), part.size(0, tokens)
    if vocabulary < TOKENS:
        raise part.unknown(f"its text encoder knows {vocabulary} tokens, CLIP's tokenizer has {TOKENS}")
    return {
        "architectures": [text.class_name],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        # The published value, which tells transformers to take the largest id for the end.
        "eos_token_id": 2,
        "hidden_act": "gelu" if text.open_clip else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": part.size(0, f"{layer}.0.{up}.weight"),
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": part.size(0, positions),
        "model_type": "clip_text_model",
        "num_attention_heads": _heads(part, width),
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": part.size(1, "text_projection") if text.projects else width,
        "vocab_size": vocabulary,
    }


def _pipeline(weights: Weights, family: Family, in_channels: int, latents: int) -> str:
    text_to_image, inpainting = family.pipelines
    if in_channels == latents:
        return text_to_image
    if in_channels == 2 * latents + 1 and inpainting:
        return inpainting
    raise CheckpointError(
        f"{weights.path}: its U-Net takes {in_channels} channels for latents of {latents}; {family.title} draws with "
        f"{latents}{f' and inpaints with {2 * latents + 1}' if inpainting else ''}"
    )


def _prediction(weights: Weights, family: Family, pipeline: str) -> str:
    """What the U-Net predicts: what the file says of itself, else what diffusers takes it for.

    diffusers takes Stable Diffusion 2 for 768-v, unless it is for inpainting or was stored at the training step of the
    base model.
    """
    late = family is SD2 and pipeline == SD2.pipelines[0] and weights.global_step != _SD2_BASE_STEPS
    return prediction_type(weights, family) or ("v_prediction" if late else "epsilon")


def _scheduler(weights: Weights, family: Family, pipeline: str, predicts: str) -> Config:
    """The scheduler published with the family; a file trained for it has a last step of pure noise."""
    pure = {"rescale_betas_zero_snr": True} if zero_snr(weights) else {}
    base = {**_NOISE, "prediction_type": predicts, **pure}
    if family in (SDXL, REFINER):
        return {"_class_name": "EulerDiscreteScheduler", **base, **_EULER}
    ddim = predicts == "v_prediction" if family is SD2 else pipeline == SD1.pipelines[1]
    return {"_class_name": "DDIMScheduler" if ddim or pure else "PNDMScheduler", **base}
