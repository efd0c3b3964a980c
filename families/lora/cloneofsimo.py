"""The lists of cloneofsimo/lora (2022): pairs of factors in the order in which that code walked the model.

A `.pt` is a list up, down, up, down …; a safetensors file has `unet:0:up`, `unet:0:down`, … The linear layers of all
attentions and of the first half of each feed-forward are walked, down, up, middle, and within a block attn1, ff, attn2,
as diffusers had them then, or attn1, attn2, ff, as it has them now; the shapes tell which.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from ...common.arrays import Array

_KEY = re.compile(r"(unet|text_encoder):([0-9]{1,4}):(up|down)")
_NUMBER = re.compile(r"[0-9]{1,4}")
_BLOCK = re.compile(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)\.(.+)\.weight")
_SIDES = ("down", "up", "mid")
_ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))
_LINEAR = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|q_proj|out_proj)\.weight")
_PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")


def named(
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    denoiser: str,
) -> dict[str, Array] | None:
    """The tensors under names that say what they are for; None for another kind, or where it does not fit."""
    lists: dict[str, dict[tuple[int, str], Array]] = {}
    made: dict[str, Array] = {}
    if tensors and all(_NUMBER.fullmatch(name) for name in tensors):
        kinds = ("up", "down")
        lists["unet"] = {(int(name) // 2, kinds[int(name) % 2]): array for name, array in tensors.items()}
    elif any(_KEY.fullmatch(name) for name in tensors):
        for name, array in tensors.items():
            found = _KEY.fullmatch(name)
            if found is None:  # vectors of new words, which stand beside the factors
                made[name] = array
            else:
                lists.setdefault(found[1], {})[int(found[2]), found[3]] = array
    if not lists:
        return None
    for component, own in lists.items():
        walked = _walks(component, shapes.get(denoiser if component == "unet" else component, {}))
        pairs = [(own.get((i, "up")), own.get((i, "down"))) for i in range(1 + max(place[0] for place in own))]
        fitting = next((modules for modules in walked if _fit(pairs, modules)), None)
        if fitting is None:
            return None
        for (module, _), (up, down) in zip(fitting, pairs, strict=True):
            if up is None or down is None:  # `_fit` looked
                return None
            made[f"{component}.{module}.lora.up.weight"], made[f"{component}.{module}.lora.down.weight"] = up, down
    return made


_Walk = list[tuple[str, tuple[int, ...]]]


def _walks(component: str, shapes: Mapping[str, tuple[int, ...]]) -> list[_Walk]:
    """The modules in each of the orders in which they may have been walked, with the shapes of their weights."""
    if component != "unet":
        layers = sorted((int(m[1]), _PROJECTIONS.index(m[2]), name) for name in shapes if (m := _TEXT.fullmatch(name)))
        return [[(name.removesuffix(".weight"), shapes[name]) for _, _, name in layers]]
    walks = []
    for order, with_ff in itertools.product(_ORDERS, (True, False)):
        placed = []
        for name in shapes:
            found = _BLOCK.fullmatch(name)
            if found is None:
                continue
            part, _, rest = found[5].partition(".")
            if (part == "ff" and (not with_ff or rest != "net.0.proj")) or part not in order:
                continue
            place = _LINEAR.index(rest) if rest in _LINEAR else 0
            numbers = (_SIDES.index(found[1]), int(found[2] or 0), int(found[3]), int(found[4]))
            placed.append(((*numbers, order.index(part), place), name))
        walks.append([(name.removesuffix(".weight"), shapes[name]) for _, name in sorted(placed)])
    return walks


def _fit(pairs: Sequence[tuple[Array | None, Array | None]], modules: _Walk) -> bool:
    """Whether each pair is of the shape of its module."""
    if len(pairs) != len(modules):
        return False
    for (up, down), (_, shape) in zip(pairs, modules, strict=True):
        if up is None or down is None or up.ndim < 2 or down.ndim < 2:
            return False
        if (up.shape[0], down.shape[1]) != shape[:2] or up.shape[1] != down.shape[0]:
            return False
    return True
