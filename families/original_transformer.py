"""The names that the original authors of FLUX.1, Stable Diffusion 3 and Z-Image gave to the weights of transformers.

Several weights of diffusers may be rows of one of theirs, one after another, such as queries, keys and values; and of
the last norms diffusers has the two halves in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple

_QKV = {"q": 0, "k": 1, "v": 2}
_TOPS: dict[str, tuple[tuple[str, str], ...]] = {
    "FluxTransformer2DModel": (
        (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
        (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
        (r"context_embedder", "txt_in"),
        (r"x_embedder", "img_in"),
        (r"proj_out", "final_layer.linear"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
        (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
        (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_q", r"double_blocks.\1.img_attn.norm.query_norm"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_k", r"double_blocks.\1.img_attn.norm.key_norm"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_q", r"double_blocks.\1.txt_attn.norm.query_norm"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_k", r"double_blocks.\1.txt_attn.norm.key_norm"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
        (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
        (r"single_transformer_blocks\.(\d+)\.(?:attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_q", r"single_blocks.\1.norm.query_norm"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_k", r"single_blocks.\1.norm.key_norm"),
        (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    ),
    "SD3Transformer2DModel": (
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"context_embedder", "context_embedder"),
        (r"proj_out", "final_layer.linear"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
        (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_[qkv]", r"joint_blocks.\1.x_block.\2.qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"joint_blocks.\1.context_block.attn.qkv"),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])", r"joint_blocks.\1.x_block.\2.ln_\3"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])", r"joint_blocks.\1.context_block.attn.ln_\2"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    ),
    "ZImageTransformer2DModel": (
        (r"all_x_embedder\.2-1", "x_embedder"),
        (r"all_final_layer\.2-1\.(.+?)", r"final_layer.\1"),
        (r"(.+)\.attention\.to_[qkv]", r"\1.attention.qkv"),
        (r"(.+)\.attention\.to_out\.0", r"\1.attention.out"),
        (r"(.+)\.attention\.norm_([qk])", r"\1.attention.\2_norm"),
        (r"(.+?)", r"\1"),
    ),
}
"""By class: the modules of diffusers, and what they are called."""
_RENAMED = {"query_norm.weight": "query_norm.scale", "key_norm.weight": "key_norm.scale"}
_ORDER = re.compile(r"\.(?:to_([qkv])|add_([qkv])_proj|(proj_mlp))\.")


TRANSFORMERS = tuple(_TOPS)
"""The classes whose original layout is known."""


class Original(NamedTuple):
    """A weight of the original authors. order: which of those that are its rows. swapped: its halves are."""

    name: str
    order: int
    swapped: bool


def originals(kind: str, names: Iterable[str]) -> dict[str, Original]:
    """For each weight of a transformer of this class what it is in the original layout; those that are in none not."""
    tables = [(re.compile(rf"{pattern}(?P<suffix>\.weight|\.bias)?"), new) for pattern, new in _TOPS[kind]]
    names = list(names)
    last = max((int(found[1]) for name in names if (found := _BLOCK.match(name))), default=-1)
    made = {}
    for name in names:
        found, new = next(((match, new) for table, new in tables if (match := table.fullmatch(name))), (None, ""))
        if found is None:
            continue
        whole = found.expand(new) + (found["suffix"] or "")
        for old, other in _RENAMED.items():
            whole = whole.removesuffix(old) + other if whole.endswith(old) else whole
        rows = _ORDER.search(name)
        order = 0 if rows is None else 3 if rows[3] else _QKV[rows[1] or rows[2]]
        is_last = kind.startswith("SD3") and name.startswith(f"transformer_blocks.{last}.norm1_context.")
        made[name] = Original(whole, order, name.startswith("norm_out.") or is_last)
    return made


class Joined(NamedTuple):
    """A weight of the original authors that is several of diffusers', one after another, or has its halves swapped.

    rows: the weights, each with its first row and how many it has.
    """

    rows: tuple[tuple[str, int, int], ...]
    swapped: bool


def joined(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, Joined]]:
    """The weights of the original layout that are one of diffusers', and the others, each by its name.

    shapes: of diffusers' weights. Both are empty for a class whose original layout is not known.
    """
    found: dict[str, list[tuple[int, str, bool]]] = {}
    for name, (original, order, swapped) in (originals(kind, shapes) if kind in _TOPS else {}).items():
        found.setdefault(original, []).append((order, name, swapped))
    single, several = {}, {}
    for original, parts in found.items():
        parts.sort()
        if len(parts) == 1 and not parts[0][2]:
            single[original] = parts[0][1]
            continue
        starts = accumulate((shapes[name][0] for _, name, _ in parts), initial=0)
        rows = tuple((name, start, shapes[name][0]) for (_, name, _), start in zip(parts, starts, strict=False))
        several[original] = Joined(rows, parts[0][2])
    return single, several


_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
