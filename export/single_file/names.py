"""The original name of each weight of a diffusers model, and the weight itself as the original layout holds it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)")
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # of LCM, for which the original code has no name
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    r"conv_norm_out": "norm_out",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"conv_shortcut": "nin_shortcut",
    r"(down|up)_blocks\.(\d+)\.resnets": r"\1.\2.block",
    r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0": r"\1.\2.\3sample",
}
_OPEN_CLIP = {
    r"^text_model\.embeddings\.token_embedding\.": "token_embedding.",
    r"^text_model\.embeddings\.position_embedding\.weight$": "positional_embedding",
    r"^text_model\.final_layer_norm\.": "ln_final.",
    r"^text_projection\.weight$": "text_projection",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm([12])\.": r".ln_\1.",
    r"\.fc1\.": ".c_fc.",
    r"\.fc2\.": ".c_proj.",
    r"\.self_attn\.[qkv]_proj\.": ".attn.in_proj_",
    r"\.self_attn\.": ".attn.",
}


def unet_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """Original name by diffusers name. layers: `layers_per_block`."""
    names = tuple(names)
    return {name: _unet_name(name, layers + 1, names) for name in names}


def _unet_name(name: str, every: int, names: tuple[str, ...]) -> str:
    """every: how many blocks the original counts for each level."""
    found = _BLOCK.match(name)
    if not found:
        module, _, kind = name.rpartition(".")
        return f"{_OUTSIDE.get(module, module)}.{kind}"
    side, what, rest = found[1], found[3], found[5]
    level, index = int(found[2] or 0), int(found[4])
    if what == "downsamplers":
        return f"input_blocks.{(level + 1) * every}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        behind = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
        return f"output_blocks.{level * every + every - 1}.{2 if behind else 1}.{rest}"
    if what == "resnets":
        module, _, kind = rest.partition(".")
        rest = f"{_RESIDUAL.get(module, module)}.{kind}"
    if side == "mid":
        return f"middle_block.{2 * index if what == 'resnets' else 1}.{rest}"
    block = f"input_blocks.{level * every + index + 1}" if side == "down" else f"output_blocks.{level * every + index}"
    return f"{block}.{0 if what == 'resnets' else 1}.{rest}"


def vae_names(names: Iterable[str], levels: int) -> dict[str, str]:
    """Original name by diffusers name. levels: of `block_out_channels`; the original counts the decoder's backwards."""

    def backwards(found: re.Match[str]) -> str:
        return f"decoder.up.{levels - 1 - int(found[1])}."

    return {name: re.sub(r"^decoder\.up\.(\d+)\.", backwards, _renamed(name, _VAE)) for name in names}


def clip_names(names: Iterable[str], open_clip: bool) -> dict[str, str]:
    """Original name by transformers name, with three of them to one where OpenCLIP fuses query, key and value."""
    return {name: _renamed(name, _OPEN_CLIP) if open_clip else name for name in names}


def _renamed(name: str, rules: dict[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def convert(name: str, tensor: Any, open_clip: bool) -> Any:
    """Weight `name` of a diffusers model out of the `tensor` that the original layout has for it.

    Raises what torch raises for a tensor of the wrong rank.
    """
    if open_clip and (found := re.search(r"\.self_attn\.([qkv])_proj\.", name)):
        return tensor.unflatten(0, (3, -1))["qkv".index(found[1])]
    if open_clip and name == "text_projection.weight":
        return tensor.t()
    if re.search(r"coder\.mid_block\.attentions\.0\.to_.*weight$", name):  # there a convolution of one pixel
        return tensor.flatten(1) if tensor.ndim > 2 else tensor
    return tensor
