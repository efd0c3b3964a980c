"""ControlNets (Zhang et al. 2023), and the U-Net that their residuals are added in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor

from ...bundle import Tensor
from ...bundle.wiring import MODE, PICTURE, SCALE, STRENGTH
from ...families import Pipeline
from ...families.control import (
    MOST_SLOTS,
    PICTURES,
    PREFIX,
    T2I_PREFIX,
    intrablock_residuals,
    intrablocks,
    residuals,
    slot,
)
from ...families.image_prompt import MASK, TOKENS, halvings, inputs
from ...families.image_prompt import SCALE as SCALES
from ..checkpoint import Checkpoint
from ..configs import control_config, t2i_config, unet_config
from ..fit import hollow
from ..graphs.controlled import Tokens, write_controlled
from ..graphs.spec import Axis, ComponentSpec
from ..loading import load_pretrained, quiet
from .image_prompt import open_adapter
from .unet import UNet, unet

_MOST_HALVINGS = 8
_CROSS = "attn2.processor"


class ControlNet(torch.nn.Module):
    """The residuals for one denoising prediction, each times its scale.

    Of a sample that has a mask and the masked image beside the latents, the latents alone are read.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        scale: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        down, middle = self.model(
            sample[:, : self.model.config.in_channels],
            timestep,
            encoder_hidden_states,
            controlnet_cond,
            added_cond_kwargs=_added(text_embeds, time_ids),
            return_dict=False,
        )
        return _scaled((*down, middle), scale)


def _scaled(residuals: Sequence[torch.Tensor], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each residual, (B, C, H, W), times its factor in `scale`, (B, residuals)."""
    return tuple(value * scale[:, i, None, None, None] for i, value in enumerate(residuals))


def _added(text_embeds: torch.Tensor | None, time_ids: torch.Tensor | None) -> dict[str, Any] | None:
    """What XL is given beside the text, None for other models."""
    return None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}


class Union(torch.nn.Module):
    """The residuals of a ControlNet-Union for several pictures, each of a mode of its own.

    What makes it a ControlNet of one picture is added up here, the rest is diffusers' `ControlNetModel`. Where its
    layers let tokens read each other, diffusers' class lets the rows of a batch do so, position by position, which are
    alike: each token reads itself alone.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        scale: torch.Tensor,
        control_type: torch.Tensor,
        strength: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        model, rows = self.model, sample.shape[0]
        pictures = model.controlnet_cond_embedding(controlnet_cond.flatten(0, 1)).unflatten(0, (rows, -1))
        factors = strength[..., None]
        tokens = (pictures.mean((3, 4)) + control_type @ model.task_embedding) * factors
        for block in model.transformer_layes:
            attention = block.attn
            width = tokens.shape[-1]
            weight, bias = attention.in_proj_weight[-width:], attention.in_proj_bias[-width:]
            tokens = tokens + attention.out_proj(torch.nn.functional.linear(block.ln_1(tokens), weight, bias))
            tokens = tokens + block.mlp(block.ln_2(tokens))
        told = pictures * factors[..., None, None] + (model.spatial_ch_projs(tokens) * factors)[..., None, None]
        modes = model.control_type_proj(control_type.amax(1).flatten()).reshape(rows, -1)
        whole = SimpleNamespace(
            **{name: getattr(model, name) for name in _OF_A_CONTROLNET if hasattr(model, name)},
            controlnet_cond_embedding=lambda value: value,
            class_embedding=lambda value: value,
        )
        down, middle = ControlNetModel.forward(
            whole,
            sample[:, : model.config.in_channels],
            timestep,
            encoder_hidden_states,
            told.sum(1),
            class_labels=model.control_add_embedding(modes),
            added_cond_kwargs=_added(text_embeds, time_ids),
            return_dict=False,
        )
        return _scaled((*down, middle), scale)


_OF_A_CONTROLNET = (
    *("config", "dtype", "time_proj", "time_embedding", "add_time_proj", "add_embedding", "conv_in", "down_blocks"),
    *("mid_block", "controlnet_down_blocks", "controlnet_mid_block"),
)
"""What `ControlNetModel.forward` reads of a model."""


class Adapter(torch.nn.Module):
    """The residuals of a T2I-Adapter, each times its scale."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, controlnet_cond: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _scaled(self.model(controlnet_cond), scale)


class ControlledUNet(UNet):
    """One denoising prediction, with residuals added on the way, and with tokens of pictures beside the text.

    adapters: how many kinds of tokens there are, each with a scale for each cross-attention.
    """

    def __init__(self, model: Any, adapters: int = 0) -> None:
        super().__init__(model)
        self.adapters = adapters

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        **more: torch.Tensor,
    ) -> torch.Tensor:
        named = {"text_embeds": text_embeds, "time_ids": time_ids, "timestep_cond": timestep_cond, **more}
        given = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            **{name: value for name, value in named.items() if value is not None},
        }
        if not self.adapters:
            return self._predict(given, {})
        made = []
        for i in range(len(sample)):  # diffusers has one scale for all rows
            row = {name: value[i : i + 1] for name, value in given.items()}
            tokens = [row[TOKENS.format(k)] for k in range(self.adapters)]
            scales = [row[SCALES.format(k)][0].tolist() for k in range(self.adapters)]
            for layer, processor in enumerate(_cross_attentions(self.model)):
                processor.scale = [each[layer] for each in scales]
            masks = [self._masks(row, k) for k in range(self.adapters)]
            with _masks_of_sizes([each[0, 0].numel() for each in masks[0]]):
                joined = [torch.cat([each.flatten(2)[:, :, None] for each in own], -1) for own in masks]
                made.append(self._predict(row, {"image_embeds": tokens}, joined))
        return torch.cat(made)

    @staticmethod
    def _masks(row: dict[str, torch.Tensor], adapter: int) -> list[torch.Tensor]:
        name = MASK.format(adapter)
        return [value for each, value in row.items() if each == name or each.startswith(f"{name}_")]

    def _predict(
        self, given: dict[str, torch.Tensor], added: dict[str, Any], masks: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        residuals = _summed(given, "_block_res_sample")
        added = added | {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        within = _summed(given, "_intrablock_")
        result: torch.Tensor = self.model(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            timestep_cond=given.get("timestep_cond"),
            added_cond_kwargs=added or None,
            cross_attention_kwargs={"ip_adapter_masks": masks} if masks else None,
            down_block_additional_residuals=tuple(residuals[:-1]) if residuals else None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
            down_intrablock_additional_residuals=[value.clone() for value in within] or None,
            return_dict=False,
        )[0]
        return result


def _summed(given: dict[str, torch.Tensor], part: str) -> list[torch.Tensor]:
    """The inputs with `part` in their names, those of one residual added up over its slots."""
    found: dict[str, torch.Tensor] = {}
    for name, value in given.items():
        if part in name:
            whole = name.partition(".")[0]
            found[whole] = found[whole] + value if whole in found else value
    return list(found.values())


@contextmanager
def _masks_of_sizes(sizes: Sequence[int]) -> Iterator[None]:
    """Let diffusers take a mask for the one of its parts, which have these sizes, that an attention has queries for.

    It makes all sizes of one mask, where the graph is given each.
    """
    usual = IPAdapterMaskProcessor.downsample

    def part(mask: torch.Tensor, batch_size: int, num_queries: int, value_embed_dim: int) -> torch.Tensor:
        start = sum(sizes[: sizes.index(num_queries)])
        return mask.flatten()[None, start : start + num_queries, None].expand(batch_size, -1, value_embed_dim)

    IPAdapterMaskProcessor.downsample = staticmethod(part)
    try:
        yield
    finally:
        IPAdapterMaskProcessor.downsample = staticmethod(usual)


class _Given(torch.nn.Module):
    """Takes tokens for what they are projected from."""

    def forward(self, tokens: Any) -> Any:
        return tokens


def _cross_attentions(model: Any) -> list[Any]:
    """The processors of those, in diffusers' order."""
    return [processor for name, processor in model.attn_processors.items() if name.endswith(_CROSS)]


def control(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`: a ControlNet or a T2I-Adapter."""
    wired = next(each for each in pipeline.wiring.controls.values() if each.component == name)
    return (adapter if wired.kind == "adapter" else controlnet)(checkpoint, name, pipeline)


def adapter(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`, which reads a picture, and a scale for each residual."""
    config, down = t2i_config(checkpoint, name.removeprefix(T2I_PREFIX)), pipeline.latents.downscale
    denoiser, made = _denoiser(checkpoint, pipeline), intrablock_residuals(unet_config(checkpoint))
    multiple = next(each.multiple for each in pipeline.wiring.controls.values() if each.component == name)
    axes = {axis: replace(each, unit=math.lcm(each.unit, multiple)) for axis, each in denoiser.axes.items()}
    picture = ("batch_size", int(config["in_channels"]), "sample_height", "sample_width")
    return replace(
        denoiser,
        name=name,
        source=name,
        load=lambda: Adapter(load_pretrained(T2IAdapter, checkpoint.folder(name))).eval(),
        hollow=lambda: Adapter(hollow(T2IAdapter, checkpoint.config(name))),
        inputs=(Tensor(PICTURE, "float32", picture), Tensor(SCALE, "float32", ("batch_size", len(made)))),
        outputs=made,
        axes={axis: axes[axis] for axis in ("batch_size", "height", "width")},
        tied={"sample_height": ("height", down, 1), "sample_width": ("width", down, 1), **_halves()},
        repeat="",
        per_prompt=(PICTURE,),
    )


def controlnet(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`, which reads what the denoiser reads, a picture, and a scale for each residual."""
    config = control_config(checkpoint, name.removeprefix(PREFIX))
    own = {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}
    given = [tensor for tensor in pipeline.inputs if tensor.name in own]
    made = residuals(config, bool(config.get("global_pool_conditions")))
    down = pipeline.latents.downscale
    denoiser = _denoiser(checkpoint, pipeline)
    modes = config.get("num_control_type")
    module, kind = (ControlNet, ControlNetModel) if modes is None else (Union, ControlNetUnionModel)
    rows = ("batch_size",) if modes is None else ("batch_size", PICTURES)
    picture = (*rows, int(config["conditioning_channels"]), "sample_height", "sample_width")
    inputs = [*given, Tensor(PICTURE, "float32", picture), Tensor(SCALE, "float32", ("batch_size", len(made)))]
    if modes is not None:
        inputs += [Tensor(MODE, "float32", (*rows, int(modes))), Tensor(STRENGTH, "float32", rows)]
    return replace(
        denoiser,
        name=name,
        source=name,
        load=lambda: module(load_pretrained(kind, checkpoint.folder(name))).eval(),
        hollow=lambda: module(hollow(kind, checkpoint.config(name))),
        inputs=tuple(inputs),
        outputs=made,
        axes=denoiser.axes if modes is None else {**denoiser.axes, PICTURES: Axis(1, 3)},
        tied={"sample_height": ("height", down, 1), "sample_width": ("width", down, 1), **_halves()},
        per_prompt=(*(each for each in denoiser.per_prompt if each in own), PICTURE, *([MODE] if modes else [])),
    )


def controlled_unet(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`: the denoiser that takes residuals and tokens of pictures."""
    denoiser, config, wiring = _denoiser(checkpoint, pipeline), unet_config(checkpoint), pipeline.wiring
    adapters = sum(each.kind == "adapter" for each in wiring.controls.values())
    counts = len(wiring.controls) - adapters, adapters
    slots = (min(counts[0], MOST_SLOTS), min(counts[1], MOST_SLOTS))
    more = residuals(config) if counts[0] else ()
    within = intrablock_residuals(config) if counts[1] else ()
    taken = [
        replace(each, name=slot(each.name, k))
        for i, made in ((1, within), (0, more))
        for k in range(slots[i])
        for each in made
    ]
    files = {wired: open_adapter(checkpoint, wired) for wired in wiring.image_prompts.values()}
    attentions = cross_attentions(checkpoint) if files else {}
    levels = [halvings(each, len(config["block_out_channels"])) for each in attentions]
    told = {wired: inputs(wired, int(config["cross_attention_dim"]), levels) for wired in files}

    def load() -> Any:
        model = load_pretrained(UNet2DConditionModel, checkpoint.folder("unet"))
        if files:
            states = [
                {part: {n: t.float() for n, t in own.items()} for part, own in f.state().items()}
                for f in files.values()
            ]
            with quiet():
                model._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
            model.encoder_hid_proj = _Given()
            for processor in _cross_attentions(model):
                processor.float()
        return ControlledUNet(model, len(files)).eval()

    def write(plain: Path, folder: Path) -> None:
        sizes = [sorted(set(levels)).index(each) for each in levels]
        tokens = []
        for wired, file in files.items():
            of_tokens, scale, *masks = told[wired]
            weights = [(np.asarray(key.float()).T, np.asarray(value.float()).T) for key, value in file.layers()]
            layers = [(key, value, size) for (key, value), size in zip(weights, sizes, strict=True)]
            tokens.append(Tokens(of_tokens, scale, masks, list(attentions), layers))
        places = [number for number, _ in intrablocks(config)]
        write_controlled(plain, folder, more, tokens, list(zip(places, within, strict=False)), slots)

    axes = {f"{wired.tokens}_{axis}": Axis(1, most) for wired in files for axis, most in (("groups", 3), ("length", 6))}
    return replace(
        denoiser,
        name=name,
        load=load,
        hollow=lambda: ControlledUNet(hollow(UNet2DConditionModel, checkpoint.config("unet"))),
        inputs=(*denoiser.inputs, *taken, *(each for given in told.values() for each in given)),
        axes={**denoiser.axes, **axes},
        tied=_halves(),
        per_prompt=(*denoiser.per_prompt, *(name for each in files for name in each.inputs if name != each.scale)),
        more_sources=tuple(wired.component for wired in files),
        rewrites=denoiser.name,
        rewrite=write,
    )


def cross_attentions(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The shapes of the keys of the denoiser's cross-attentions, (C, width), by their names, in diffusers' order."""
    model = hollow(UNet2DConditionModel, checkpoint.config("unet"))
    names = [name.removesuffix(".processor") for name in model.attn_processors if name.endswith(_CROSS)]
    return {name: tuple(model.get_submodule(name).to_k.weight.shape) for name in names}


def _denoiser(checkpoint: Checkpoint, pipeline: Pipeline) -> ComponentSpec:
    return unet(checkpoint, next(name for name, part in pipeline.parts.items() if part.role == "denoiser"), pipeline)


def _halves() -> dict[str, tuple[str, int, int]]:
    """The axes of values whose sides were halved."""
    return {f"{axis}_{2**k}": (axis, 1, 2**k) for axis in ("height", "width") for k in range(1, _MOST_HALVINGS)}
