"""The configurations of a single-file checkpoint: as published with its layout, in the sizes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, NoReturn

from ...common.checks import is_whole
from ...common.errors import CheckpointError
from ..checkpoint import Checkpoint
from ..weight_files import read_stated
from .layouts import SD2, UNET, VAE, Layout
from .names import clip_names
from .part_names import prefixes
from .stated import check_architecture, prediction_type, zero_snr
from .tokenizer import TOKENS
from .weights import Weights, open_weights

Config = dict[str, Any]

COND_PROJ = "time_embed.cond_proj.weight"
CHANNELS_A_HEAD = 64
BY_CONFIG = "give the diffusers folder of a checkpoint of the same make with --config FOLDER"
_DIGITS = 9
"""Of an index in a name; Python refuses to read thousands of them."""
_SD2_BASE_STEPS = 875_000
"""The training step of Stable Diffusion 2 base, by which diffusers knows that it predicts the noise."""
_SD2_LAYERS = 23
"""Layers of OpenCLIP ViT-H that Stable Diffusion 2 runs; the file also holds the last one, which it does not."""
_CLIP_SIZES = {
    "vocab_size": ("text_model.embeddings.token_embedding.weight", 0),
    "hidden_size": ("text_model.embeddings.token_embedding.weight", 1),
    "max_position_embeddings": ("text_model.embeddings.position_embedding.weight", 0),
    "intermediate_size": ("text_model.encoder.layers.0.mlp.fc1.weight", 0),
}


@dataclass(frozen=True, slots=True)
class Part:
    """The shapes below one prefix of a file."""

    path: Path
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, weights: Weights, prefix: str) -> Part:
        """The tensors of `weights` whose names begin with `prefix`, which is removed."""
        names = (name for name in weights.shapes if name.startswith(prefix))
        return cls(weights.path, prefix, {name.removeprefix(prefix): weights.shapes[name] for name in names})

    def size(self, axis: int, *names: str) -> int:
        """The size along `axis` of the first of `names` that is there. Raises `CheckpointError` for none."""
        shape = next((self.shapes[name] for name in names if name in self.shapes), None)
        if shape is None:
            raise CheckpointError(
                f"{self.path} lacks {self.prefix}{names[0]}, which shows its size: it is incomplete, download it again"
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

    def depth(self, block: str) -> int:
        """How many transformer blocks the attention `block` has; 0 where it is not there."""
        return self.count(re.escape(block) + r"\.transformer_blocks\.(\d+)\.")

    def unknown(self, what: str) -> CheckpointError:
        """The error for what neither the shapes nor the layout say."""
        return CheckpointError(
            f"{self.path}: {what}, so its configuration cannot be known: "
            "give the diffusers folder of a checkpoint of the same make as the configuration"
        )


_CLIP_MARKS = ("text_model.embeddings.token_embedding.weight", "positional_embedding")
_MARKS = {
    "transformer": ("pos_embed",),
    "vae": ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"),
    **dict.fromkeys(("text_encoder", "text_encoder_2"), _CLIP_MARKS),
}
"""By component the tensors, without a prefix, that are in the layouts whose sizes are read: each, or of CLIP one."""


def part_in(weights: Weights, name: str) -> Part | None:
    """The shapes of the component `name` under the names of the original authors, None where it has others."""
    marks = _MARKS[name]
    for prefix in (*prefixes(name, ""), ""):
        there = [prefix + mark in weights.shapes for mark in marks]
        if any(there) if name.startswith("text") else all(there):
            return Part.of(weights, prefix)
    return None


def built_in(
    weights: Weights, layout: Layout, predicts: str | None, other_vae: Path | None = None
) -> dict[str, Config]:
    """What `layout` was published with, in the sizes of `weights`: `model_index`, `scheduler` and each model's folder.

    predicts: the prediction type, instead of what the file says or is taken for. other_vae: the file or folder of the
    autoencoder that it is used with, where it has none.
    Raises `CheckpointError` where the weights do not say their sizes.
    """
    check_architecture(weights, layout)
    setup = layout.published()
    forms = setup.pop("forms")
    unet, vae = setup["unet"], setup["vae"]
    vae.update(vae_sizes(Part.of(weights, VAE), vae) if other_vae is None else _sizes_of_other(other_vae, vae))
    unet.update(_unet_sizes(weights, unet))
    if layout.sizes:
        unet.update(_embedded_sizes(weights, layout))
    for text in layout.text_encoders:
        setup[text.name].update(text_sizes(Part.of(weights, text.prefix), text.open_clip, layout, setup[text.name]))
    inpaints = _inpaints(weights, layout, unet["in_channels"], vae["latent_channels"], "inpainting" in forms)
    predicts = predicts or prediction_type(weights, layout) or _assumed_prediction(weights, layout, inpaints)
    for form in ["inpainting"] * inpaints + [predicts] + ["zero_snr"] * zero_snr(weights):
        for folder, changes in forms.get(form, {}).items():
            setup[folder].update(changes)
    unet["sample_size"] = vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)
    return _predicting(setup, predicts)


def _predicting(setup: dict[str, Config], predicts: str | None) -> dict[str, Config]:
    scheduler = setup["scheduler"]
    if predicts:
        scheduler["prediction_type"] = predicts
    setup["model_index"]["scheduler"] = ["diffusers", scheduler["_class_name"]]
    return setup


def setup_of(folder: Path, layout: Layout, predicts: str | None) -> dict[str, Config]:
    """The setup of the diffusers folder `folder`, see `built_in`. Raises `CheckpointError` when it is not of `layout`.

    predicts: the prediction type, instead of the scheduler's.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: the configuration must be a folder in the diffusers layout")
    checkpoint = Checkpoint.open(folder)
    index, due = checkpoint.index, layout.published()["model_index"]
    texts = [text.name for text in layout.text_encoders]
    named = sorted(name for name, part in index.items() if name.startswith("text_encoder") and part != [None, None])
    if named != texts:
        raise CheckpointError(
            f"the configuration {folder} has {' and '.join(named) or 'no text encoder'}, the weights are of "
            f"{layout.title}, which has {' and '.join(texts)}: give a folder of that family"
        )
    for name in layout.models:
        stated = (index.get(name) or [None, None])[1]
        if stated != due[name][1]:
            raise CheckpointError(
                f"the configuration {folder} has {stated} for its {name}, a single file of {layout.title} holds "
                f"{due[name][1]}: give a folder that has it"
            )
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    # The index decides, as in diffusers, where the two name different classes.
    scheduler["_class_name"] = (index.get("scheduler") or [None, None])[1] or scheduler.get("_class_name")
    parts = {name: part for name, part in due.items() if isinstance(part, list)}
    flags = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    if "requires_safety_checker" in flags:
        flags["requires_safety_checker"] = False
    setup = {name: checkpoint.config(name) for name in layout.models}
    setup |= {"model_index": {"_class_name": checkpoint.class_name, **flags, **parts}, "scheduler": scheduler}
    return _predicting(setup, predicts)


def _unet_sizes(weights: Weights, published: Config) -> Config:
    """What the shapes say of a `UNet2DConditionModel`."""
    part = Part.of(weights, UNET)
    count = part.count(r"input_blocks\.(\d+)\.")
    every = gcd(*part.indices(r"input_blocks\.(\d+)\.0\.op\.")) or count or 1  # blocks a level, the downsampler counted
    starts = range(1, count + 1, every)
    widths = [
        part.size(0, f"input_blocks.{i}.0.out_layers.3.weight", f"input_blocks.{i}.0.in_layers.2.weight")
        for i in starts
    ]
    attention = next((name for name in sorted(part.shapes) if name.endswith(".attn2.to_k.weight")), None)
    if attention is None or not count:
        raise part.unknown(f"its U-Net has no {'cross-attention' if count else 'blocks'}")
    projection = attention.split(".transformer_blocks.")[0] + ".proj_in.weight"
    down = [[part.depth(f"input_blocks.{i + j}.1") for j in range(every - 1)] for i in starts]
    up = [[part.depth(f"output_blocks.{i + j - 1}.1") for j in range(every)] for i in reversed(starts)]
    # diffusers reads the depth of the middle off the last level, which is free where that level has no attention.
    middle = part.depth("middle_block.1") or 1
    forth = [_depth(a, b) for a, b in zip(down[:-1], up[:-1], strict=True)] + [_depth(down[-1], up[-1], middle)]
    back = [_depth(b, a) for a, b in zip(down, up, strict=True)]
    attentive = [any(a) or any(b) for a, b in zip(down, up, strict=True)]
    # Distilled models keep one residual block of the middle, and no attention there.
    bare = part.count(r"middle_block\.(\d+)\.") == 1
    return {
        "attention_head_dim": published.get("attention_head_dim") or [heads(part, width) for width in widths],
        "block_out_channels": _grouped(part, widths, published),
        "cross_attention_dim": part.size(1, attention),
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attentive],
        "in_channels": part.size(1, "input_blocks.0.0.weight"),
        "layers_per_block": every - 1,
        "mid_block_type": "UNetMidBlock2D" if bare else "UNetMidBlock2DCrossAttn",
        "out_channels": part.size(0, "out.2.weight"),
        "reverse_transformer_layers_per_block": back[::-1],
        "time_cond_proj_dim": part.size(1, COND_PROJ) if COND_PROJ in part.shapes else None,
        "transformer_layers_per_block": forth,
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attentive)],
        "use_linear_projection": len(part.shapes.get(projection, ())) == 2,
    }


def _depth(found: list[int], other: list[int], default: int = 1) -> int | list[int]:
    """The depths of the attentions of a level, as one number where they are equal. other: of its other side.

    One that a file lacks beside others of its level is taken to be as deep as they are, to be missed later.
    """
    deepest = max(found, default=0) or max(other, default=0) or default
    filled = [depth or deepest for depth in found]
    return filled if set(filled) - {deepest} else deepest


def heads(part: Part, width: int) -> int:
    """The heads of an attention of this width. Raises `CheckpointError` for a width of no whole number of them."""
    if width % CHANNELS_A_HEAD:
        raise part.unknown(f"{width} channels are no multiple of {CHANNELS_A_HEAD}, the channels of a head")
    return width // CHANNELS_A_HEAD


def _grouped(part: Part, widths: list[int], published: Config) -> list[int]:
    groups = published["norm_num_groups"]
    for width in widths:
        if width % groups:
            raise part.unknown(f"{width} channels do not divide into the {groups} groups of a norm")
    return widths


def _embedded_sizes(weights: Weights, layout: Layout) -> Config:
    """The embedding of the pooled text and of the numbers beside it (Podell et al. 2023, section 2.2)."""
    unet, text = Part.of(weights, UNET), Part.of(weights, layout.text_encoders[-1].prefix)
    width = unet.size(1, "label_emb.0.0.weight")
    rest = width - text.size(1, "text_projection")
    if rest <= 0 or rest % (2 * layout.sizes):
        raise unet.unknown(f"{rest} channels do not divide into the embeddings of {layout.sizes} numbers")
    return {"addition_time_embed_dim": rest // layout.sizes, "projection_class_embeddings_input_dim": width}


def vae_sizes(part: Part, published: Config) -> Config:
    """What the shapes say of an `AutoencoderKL`. Raises `CheckpointError` where they do not say it."""
    levels = part.count(r"encoder\.down\.(\d+)\.")
    blocks = [f"encoder.down.{level}.block.0" for level in range(levels)]
    widths = [part.size(0, f"{block}.conv1.weight", f"{block}.conv2.weight") for block in blocks]
    return {
        "block_out_channels": _grouped(part, widths, published),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": part.size(1, "encoder.conv_in.weight"),
        "latent_channels": part.size(1, "decoder.conv_in.weight"),
        "layers_per_block": part.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "out_channels": part.size(0, "decoder.conv_out.weight"),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": any(name.startswith("quant_conv.") for name in part.shapes),
        "use_post_quant_conv": any(name.startswith("post_quant_conv.") for name in part.shapes),
    }


def _sizes_of_other(path: Path, published: Config) -> Config:
    """The sizes of an autoencoder in a file or folder of its own. Raises `CheckpointError` where it says none."""
    if path.is_file():
        part = part_in(open_weights(path), "vae")
        return vae_sizes(part, published) if part is not None else unread(path, "vae")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give the diffusers folder of the component 'vae', or a file of it")
    stated = read_stated(path / "config.json", "the configuration of the autoencoder")
    blocks = stated.get("block_out_channels", stated.get("decoder_block_out_channels", [64]))
    found = {"latent_channels": stated.get("latent_channels", 4), "block_out_channels": blocks}
    if not is_whole(found["latent_channels"]) or not isinstance(blocks, list) or not blocks:
        raise CheckpointError(f"{path}/config.json says no sizes of an autoencoder: give the one it was saved with")
    return found


def unread(path: Path, name: str) -> NoReturn:
    """Raise `CheckpointError` for a file whose names do not tell the sizes of the component `name`."""
    raise CheckpointError(
        f"{path} holds no {name} under the names of the original authors, by which its sizes are read: {BY_CONFIG}"
    )


def text_sizes(part: Part, open_clip: bool, layout: Layout | None, published: Config) -> Config:
    """What the shapes say of a `CLIPTextConfig`. Raises `CheckpointError` where they do not say it.

    open_clip: whether the names are OpenCLIP's. layout: None for Stable Diffusion 3.
    """
    names = clip_names((name for name, _ in _CLIP_SIZES.values()), open_clip)
    sizes = {key: part.size(axis, names[name]) for key, (name, axis) in _CLIP_SIZES.items()}
    if sizes["vocab_size"] < TOKENS:
        raise part.unknown(f"its text encoder knows {sizes['vocab_size']} tokens, CLIP's tokenizer has {TOKENS}")
    blocks = r"transformer\.resblocks" if open_clip else r"text_model\.encoder\.layers"
    layers, width = part.count(rf"{blocks}\.(\d+)\."), sizes["hidden_size"]
    if layout is SD2:
        # Files that were made from a diffusers folder lack the projection, and with it the last layer.
        whole = layers in (_SD2_LAYERS, _SD2_LAYERS + 1)
        layers = _SD2_LAYERS if whole else layers - ("text_projection" in part.shapes)
    projection = "text_projection" if open_clip else "text_projection.weight"
    projects = published["architectures"] == ["CLIPTextModelWithProjection"] and (layout or projection in part.shapes)
    return {
        **sizes,
        "num_attention_heads": heads(part, width),
        "num_hidden_layers": layers,
        "projection_dim": part.size(1 if open_clip else 0, projection) if projects else width,
    }


def _inpaints(weights: Weights, layout: Layout, channels: int, latents: int, can: bool) -> bool:
    """Whether the U-Net inpaints. can: whether one of `layout` does."""
    if channels != latents and not (can and channels == 2 * latents + 1):
        raise CheckpointError(
            f"{weights.path}: its U-Net takes {channels} channels for latents of {latents}; {layout.title} draws with "
            f"{latents}{f' and inpaints with {2 * latents + 1}' if can else ''}"
        )
    return channels != latents


def _assumed_prediction(weights: Weights, layout: Layout, inpaints: bool) -> str:
    """What diffusers takes a U-Net to predict whose file does not say it.

    Stable Diffusion 2 is 768-v, unless it is for inpainting or was stored at the training step of the base model.
    """
    late = layout is SD2 and not inpaints and weights.global_step != _SD2_BASE_STEPS
    return "v_prediction" if late else "epsilon"
