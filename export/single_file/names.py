"""The original name of each weight of a diffusers model, and the weight itself as the original layout holds it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ...families.original import unet_names

__all__ = ["clip_names", "convert", "unet_names", "vae_names"]

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
