"""What the original authors call the parts of a U-Net that diffusers has other names for."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
