"""What controls add to a denoiser: the residuals of a ControlNet, as the configurations of both say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..bundle import Tensor
from ..bundle.wiring import MOST_MODES, Control
from ..common.errors import CheckpointError
from .family import Part, Pipeline

CONTROLNET = "ControlNetModel"
PREFIX = "controlnet_"
"""Of the names of components that are controls."""
UNION = "ControlNetUnionModel"
MODES = ("openpose", "depth", "softedge", "canny", "normal", "segment", "tile", "repaint")
"""What the pictures of a ControlNet-Union are of, by the numbers that its authors gave them."""


def mode_names(control: Control) -> tuple[str, ...]:
    """Of the modes of a ControlNet-Union: their numbers where there are none."""
    named = control.mode_names or (MODES if control.modes in _PUBLISHED else ())
    return tuple(named[i] if i < len(named) else str(i) for i in range(control.modes))


PICTURES = "pictures"
"""The axis of the pictures that one is given."""
_PUBLISHED = (6, len(MODES))
"""How many the published ones know."""
T2I_ADAPTER, T2I_PREFIX = "T2IAdapter", "t2i_adapter_"
"""The class of T2I-Adapters, and how the names of their components begin."""
CONTROLLED = "{}_controlled"
"""The name of the denoiser that takes residuals, after the plain one."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A value of the denoiser's way down that its way up reads again. halvings: how often its sides were halved."""

    channels: int
    halvings: int


def skips(unet: Mapping[str, Any]) -> list[Skip]:
    """Those of a U-Net or a ControlNet of this configuration, in the order in which they are made."""
    blocks = [int(each) for each in unet["block_out_channels"]]
    layers = unet.get("layers_per_block", 2)
    counts = [layers] * len(blocks) if isinstance(layers, int) else list(layers)
    found = [Skip(blocks[0], 0)]
    for i, (channels, count) in enumerate(zip(blocks, counts, strict=True)):
        found += [Skip(channels, i)] * count
        if i + 1 < len(blocks):
            found.append(Skip(channels, i + 1))
    return found


def residuals(unet: Mapping[str, Any], pooled: bool = False) -> tuple[Tensor, ...]:
    """What a ControlNet gives for each skip and for the middle, named as diffusers names them.

    Sides that were halved k times, and rounded up each time, are the axes `height_{2^k}` and `width_{2^k}`.
    pooled: whether they have no sides.
    """
    found = skips(unet)
    named = [(f"down_block_res_sample_{i}", each) for i, each in enumerate(found)]
    named.append(("mid_block_res_sample", Skip(found[-1].channels, found[-1].halvings)))
    return tuple(
        Tensor(
            name,
            "float32",
            ("batch_size", each.channels, *((1, 1) if pooled else (side(axis, each.halvings) for axis in _SIDES))),
        )
        for name, each in named
    )


MOST_SLOTS = 3
"""How many controls of a kind the denoiser takes the residuals of, each as inputs of their own."""


def slot(name: str, number: int) -> str:
    """The input of the denoiser that takes the residual `name` of the control in this slot."""
    return f"{name}.{number}" if number else name


_SIDES = ("height", "width")
_T2I_BLOCKS = 4
INTRABLOCK = "down_intrablock_residual_{}"
"""Inputs of the denoiser that take what T2I-Adapters give."""


def intrablocks(unet: Mapping[str, Any]) -> list[tuple[int, Skip]]:
    """Where a T2I-Adapter adds in a U-Net of this configuration, block by block: the number of the skip, and the skip.

    After the last layer of a block with attention, and after the whole block elsewhere, as diffusers does. Where there
    are fewer than four blocks (XL), a last one is added to the middle, whose number is that of no skip.
    """
    found, kinds = skips(unet), unet["down_block_types"]
    layers = unet.get("layers_per_block", 2)
    counts = [layers] * len(kinds) if isinstance(layers, int) else list(layers)
    places, at = [], 0
    for i, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        at += count
        last = i + 1 == len(kinds)
        places.append(at if last or "CrossAttn" in kind else at + 1)
        at += 0 if last else 1
    made = [(place, found[place]) for place in places]
    return made if len(made) >= _T2I_BLOCKS else [*made, (len(found), found[-1])]


def intrablock_residuals(unet: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What a T2I-Adapter gives for each of `intrablocks`."""
    return tuple(
        Tensor(
            INTRABLOCK.format(i),
            "float32",
            ("batch_size", each.channels, *(side(axis, each.halvings) for axis in _SIDES)),
        )
        for i, (_, each) in enumerate(intrablocks(unet))
    )


def with_t2i_adapters(
    pipeline: Pipeline, unet: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]]
) -> Pipeline:
    """`pipeline` with T2I-Adapters, by the names given to them. unet, adapters: their configurations.

    Raises `CheckpointError` for one that was made for another denoiser, or that has the name of a ControlNet.
    """
    parts, found = dict(pipeline.parts), dict(pipeline.wiring.controls)
    denoiser = next(name for name, part in parts.items() if part.role == "denoiser")
    last = parts.pop(CONTROLLED.format(denoiser), Part("controlled", parts[denoiser].source))
    due = [(each.channels, each.halvings) for _, each in intrablocks(unet)]
    for name, config in adapters.items():
        if name in found:
            raise CheckpointError(f"a ControlNet is called {name} already: give the T2I-Adapter another name")
        own = _given(config, pipeline.latents.downscale)
        if own != due:
            raise CheckpointError(
                f"the T2I-Adapter {name} ({config.get('adapter_type')}) gives residuals of (channels, halvings) {own}, "
                f"this checkpoint takes {due}: it was made for another model; give one that was trained with this kind "
                "of checkpoint"
            )
        parts[T2I_PREFIX + name] = Part("control", T2I_PREFIX + name)
        multiple = int(config.get("downscale_factor", 8)) // pipeline.latents.downscale
        channels = int(config.get("in_channels", 3))
        found[name] = Control(T2I_PREFIX + name, len(due), channels, kind="adapter", multiple=multiple)
    if found:
        parts[CONTROLLED.format(denoiser)] = last
    return replace(pipeline, parts=parts, wiring=replace(pipeline.wiring, controls=found))


def _given(config: Mapping[str, Any], downscale: int) -> list[tuple[int, float]]:
    """Channels and halvings of what a T2I-Adapter of this configuration gives. downscale: pixels a latent.

    It begins at its own downscale and halves the sides before each block, those of XL before the third alone. A light
    one has a last block that is named nowhere.
    """
    first = math.log2(int(config.get("downscale_factor", 8)) / downscale)
    first = int(first) if first.is_integer() else first
    kind, channels = config.get("adapter_type"), list(config["channels"])
    given = [*channels, *channels[-1:]] if kind == "light_adapter" else channels
    return [(int(each), first + (i > 1 if kind == "full_adapter_xl" else i)) for i, each in enumerate(given)]


def side(axis: str, halvings: int) -> str:
    """The name of an axis that was halved so often."""
    return f"{axis}_{2**halvings}" if halvings else axis


def halved(axes: Mapping[str, int], most: int = 16) -> dict[str, int]:
    """The sizes of `height` and `width` in `axes`, and of all halves of them; with both, the tokens they make."""
    halvings = range(most.bit_length())
    found = {side(axis, k): -(-axes[axis] // 2**k) for axis in _SIDES if axis in axes for k in halvings}
    if all(axis in axes for axis in _SIDES):
        found |= {tokens(2**k): math.prod(found[side(axis, k)] for axis in _SIDES) for k in halvings}
    return found


def tokens(patch: int) -> str:
    """The name of the axis of tokens of so many latents a side, a power of two."""
    return f"tokens_{patch}"


def controlled(pipeline: Pipeline, unet: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]) -> Pipeline:
    """`pipeline` with ControlNets, by the names given to them. unet: the configuration of its denoiser.

    Raises `CheckpointError` for one that was made for another denoiser.
    """
    parts, found = dict(pipeline.parts), {}
    denoiser = next(name for name, part in parts.items() if part.role == "denoiser")
    for name, config in controls.items():
        component = PREFIX + name
        _check(name, config, unet, pipeline.latents.channels)
        _check_union(name, config)
        parts[component] = Part("control", component)
        pooled = bool(config.get("global_pool_conditions", False))
        channels = int(config.get("conditioning_channels", 3))
        wired = Control(component, len(residuals(config)), channels, pooled)
        if "num_control_type" in config:
            wired = replace(wired, kind="union", modes=int(config["num_control_type"]))
        found[name] = wired
    if controls:
        parts[CONTROLLED.format(denoiser)] = Part("controlled", parts[denoiser].source)
    return replace(pipeline, parts=parts, wiring=replace(pipeline.wiring, controls=found))


def _check(name: str, config: Mapping[str, Any], unet: Mapping[str, Any], channels: int) -> None:
    """Raise `CheckpointError` unless a ControlNet of this configuration fits the U-Net of that one."""
    for what, own, theirs in (
        ("reads text of width", config.get("cross_attention_dim"), unet.get("cross_attention_dim")),
        ("takes the added embeddings", config.get("addition_embed_type"), unet.get("addition_embed_type")),
        ("takes latent channels", config.get("in_channels"), channels),
        ("gives residuals of (channels, halvings)", _shown(config), _shown(unet)),
    ):
        if own != theirs:
            raise CheckpointError(
                f"the ControlNet {name} {what} {own}, this checkpoint {theirs}: it was made for another model; "
                "give one that was trained with this kind of checkpoint"
            )
    for what, taken in (
        ("class embeddings (class_embed_type)", config.get("class_embed_type") is not None),
        ("class embeddings (num_class_embeds)", config.get("num_class_embeds") is not None),
        ("projected text embeddings (encoder_hid_dim)", config.get("encoder_hid_dim") is not None),
    ):
        if taken:
            raise CheckpointError(f"the ControlNet {name} takes {what}, which is not supported")


def _check_union(name: str, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a ControlNet-Union whose numbers cannot be; other ControlNets have none of them."""
    if "num_control_type" not in config:
        return
    width = config["block_out_channels"][0]
    for key, most in (
        ("num_control_type", MOST_MODES),
        ("num_trans_channel", width),
        ("num_proj_channel", width),
        ("num_trans_head", width),
        ("num_trans_layer", None),
        ("addition_time_embed_dim", None),
    ):
        value: Any = config.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        fits = whole and (most is None or value <= most)
        if key in ("num_trans_channel", "num_proj_channel"):
            fits = fits and value == width
        if key == "num_trans_head":
            fits = fits and width % value == 0
        if not fits:
            due = f"from 1 to {most}" if key == "num_control_type" else f"{width}" if "channel" in key else "otherwise"
            raise CheckpointError(
                f"the ControlNet-Union {name} says {key} {value!r:.40} in its config.json, where it must be {due}: "
                "give the file that came with its weights"
            )


def _shown(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(each.channels, each.halvings) for each in skips(config)]
