"""The original name of each weight of a diffusers model, for saying which ones a single file lacks.

The tensors are renamed by diffusers' own conversion, which says nothing of what it did not find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_Rules = tuple[tuple[str, str], ...]

_BLOCK = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
_RESIDUAL: _Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
_UNET_OUTSIDE: _Rules = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^time_embedding\.cond_proj\.", "time_embed.cond_proj."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
)
_VAE: _Rules = (
    (r"conv_norm_out\.", "norm_out."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
)
_OPEN_CLIP: _Rules = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.", ".attn."),
)


def unet_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """Original name by diffusers name. layers: `layers_per_block`."""
    names = tuple(names)
    found = (re.match(r"up_blocks\.(\d+)\.attentions\.", name) for name in names)
    attentive = {int(match[1]) for match in found if match}
    return {name: _unet_name(name, layers, attentive) for name in names}


def _unet_name(name: str, layers: int, attentive: set[int]) -> str:
    found = re.match(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    )
    if not found:
        return _renamed(name, _UNET_OUTSIDE)
    side, what, rest = found[1], found[3], found[5]
    level, index, every = int(found[2] or 0), int(found[4]), layers + 1
    if what == "resnets":
        rest = _renamed(f".{rest}", _RESIDUAL)[1:]
    if side == "mid":
        return f"middle_block.{2 * index if what == 'resnets' else 1}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{(level + 1) * every}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        return f"output_blocks.{level * every + layers}.{2 if level in attentive else 1}.{rest}"
    block = f"input_blocks.{level * every + index + 1}" if side == "down" else f"output_blocks.{level * every + index}"
    return f"{block}.{0 if what == 'resnets' else 1}.{rest}"


def vae_names(names: Iterable[str], levels: int) -> dict[str, str]:
    """Original name by diffusers name. levels: of `block_out_channels`; the original counts the decoder's backwards."""

    def up(found: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(found[1])}.{'block.' if found[2] == 'resnets.' else 'upsample.'}"

    pattern = re.compile(r"up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)")
    return {name: pattern.sub(up, _renamed(name, _VAE)) for name in names}


def clip_names(names: Iterable[str], open_clip: bool) -> dict[str, str]:
    """Original name by transformers name, with three of them to one where OpenCLIP fuses query, key and value."""
    return {name: _renamed(name, _OPEN_CLIP) if open_clip else name for name in names}


def _renamed(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
