"""Transformers of flow matching, each behind one signature: latents, timestep, text, and what else they are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch

from ...bundle import Tensor
from ...bundle.wiring import PICTURE_SIDES
from ...common.errors import CheckpointError
from ...common.imports import imported
from ...families import Part, Pipeline
from ...families.parts import TRANSFORMER
from ..checkpoint import Checkpoint
from ..configs import transformer_config
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec
from ..guard import guarded
from ..loading import load_mapped
from ..weight_files import holds_weights
from .z_image import ZImage

_GATES = (1, 4, 6)
"""Where `AdaLayerNormZero` and `SD35AdaLayerNormZeroX` have gates among their outputs."""
TIMESTEPS = 1000
_PERIOD = 10000
_MOST_POSITIONS = 1024
"""Tokens a side of the largest picture: 16,384 pixels."""


class StableDiffusion3(torch.nn.Module):
    """`SD3Transformer2DModel`, which packs latents into tokens itself, with layers that each row may skip.

    All that a layer adds to its tokens it multiplies with gates, one number a channel, which its norms make of the
    timestep. They are multiplied here with `kept_layers`: a 1 changes no bit, and with a 0 the layer adds nothing, as
    if it were not there. One graph skips any layers, each row its own, in every engine and precision, and those few
    products of vectors are all that it takes; a choice between the tokens before and after each layer would go over
    all of them, and a second graph without the layers would hold the weights a second time.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._kept: list[torch.Tensor] = []
        model.time_text_embed.time_proj = Frequencies(model.time_text_embed.time_proj)
        for i, block in enumerate(model.transformer_blocks):
            for norm in (block.norm1, block.norm1_context):
                norm.register_forward_hook(partial(_gate, self._kept, i))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        kept_layers: torch.Tensor,
        added: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """added: further arguments of the model."""
        self._kept[:] = kept_layers.split(1, 1)
        given = (sample, encoder_hidden_states, pooled_projections, timestep)
        made: torch.Tensor = self.model(*given, **(added or {}), return_dict=False)[0]
        self._kept.clear()
        return made


def _gate(kept: Sequence[torch.Tensor], i: int, norm: Any, given: Any, made: Any) -> Any:
    """The outputs of a norm of layer i with its gates multiplied; the last layer's norm of the text makes none."""
    if not isinstance(made, tuple):
        return made
    return tuple(each * kept[i] if place in _GATES else each for place, each in enumerate(made))


class Flux(torch.nn.Module):
    """`FluxTransformer2DModel` with the packing of its pipelines, and tables in the place of its rotations.

    The angles of a position are multiples of it that need float64; the sines and cosines of all positions that a
    picture can have are made here, and the graph looks them up.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.time_text_embed.time_proj = Frequencies(model.time_text_embed.time_proj)
        model.pos_embed = Rotations(model.pos_embed)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
        picture: torch.Tensor | None = None,
        added: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """added: further arguments of the model."""
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        tokens, ids = packed(sample, 2), positions(height, width, sample.device)
        if picture is not None:
            tokens = torch.cat([tokens, packed(picture, 2)], 1)
            ids = torch.cat([ids, positions(picture.shape[2] // 2, picture.shape[3] // 2, sample.device, first=1)])
        made = self.model(
            tokens,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep / TIMESTEPS,
            img_ids=ids,
            txt_ids=text_positions(encoder_hidden_states),
            guidance=guidance,
            **(added or {}),
            return_dict=False,
        )[0]
        return unpacked(made[:, : height * width], height, width, 2)


class Frequencies(torch.nn.Module):
    """`Timesteps` with the frequencies that torch makes, which the angles of large numbers show every rounding of."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        half = embed.num_channels // 2
        exponent = -math.log(_PERIOD) * torch.arange(half, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", torch.exp(exponent / (half - embed.downscale_freq_shift)), persistent=False)
        self.scale, self.flipped = embed.scale, embed.flip_sin_to_cos

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        angles = self.scale * (timesteps[:, None].float() * self.frequencies)
        waves = [torch.cos(angles), torch.sin(angles)]
        return torch.cat(waves if self.flipped else waves[::-1], -1)


class Rotations(torch.nn.Module):
    """Cosines and sines of whole positions on each axis, (tokens, sum of the axes' widths) each."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        steps = torch.arange(_MOST_POSITIONS)
        with torch.device("cpu"):
            for i in range(len(embed.axes_dim)):
                ids = torch.zeros(len(steps), len(embed.axes_dim))
                ids[:, i] = steps
                start = sum(embed.axes_dim[:i])
                for name, table in zip(("cos", "sin"), embed(ids), strict=True):
                    own = table[:, start : start + embed.axes_dim[i]].contiguous()
                    self.register_buffer(f"{name}_{i}", own, persistent=False)
        self.axes = len(embed.axes_dim)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (
            torch.cat([getattr(self, f"{name}_{i}")[ids[:, i]] for i in range(self.axes)], -1)
            for name in ("cos", "sin")
        )
        return cos, sin


def packed(sample: torch.Tensor, patch: int) -> torch.Tensor:
    """Latents (N, C, H, W) to tokens (N, H/patch · W/patch, C · patch²), channels first within a token."""
    rows, channels, height, width = sample.shape
    tokens = sample.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return tokens.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // patch) * (width // patch), channels * patch**2)


def unpacked(tokens: torch.Tensor, height: int, width: int, patch: int) -> torch.Tensor:
    """Tokens back to latents; height, width: in tokens."""
    rows, _, channels = tokens.shape
    sample = tokens.reshape(rows, height, width, channels // patch**2, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return sample.reshape(rows, channels // patch**2, height * patch, width * patch)


def text_positions(text: torch.Tensor) -> torch.Tensor:
    """The positions of the tokens of a text (N, tokens, C), which are all zero: (tokens, 3)."""
    return torch.zeros(text.shape[1], 3, dtype=torch.int64, device=text.device)


def positions(height: int, width: int, device: Any, first: int = 0) -> torch.Tensor:
    """Whole positions of the tokens of a picture, (height · width, 3): `first`, row, column."""
    rows = torch.arange(height, device=device)[:, None].expand(height, width).reshape(-1)
    columns = torch.arange(width, device=device)[None].expand(height, width).reshape(-1)
    return torch.stack([torch.full_like(rows, first), rows, columns], -1)


_WRAPPERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "FluxTransformer2DModel": Flux,
    "SD3Transformer2DModel": StableDiffusion3,
    "ZImageTransformer2DModel": ZImage,
}


def _wrapper(kind: str, part: Part) -> Callable[[Any], torch.nn.Module]:
    """What gives a transformer of the class `kind` the inputs of the wiring. Raises `CheckpointError` for none."""
    if part.wrapper:
        found: Callable[[Any], torch.nn.Module] = imported(part.wrapper, "the wrapper", "a torch module")
        return found
    if kind not in _WRAPPERS:
        raise CheckpointError(
            f"there is no wrapper for a {kind}, only for {', '.join(_WRAPPERS)}: let the family name one "
            "(wrapper='module:Class')"
        )
    return _WRAPPERS[kind]


_LAYERS = {
    "num_layers": "transformer_blocks",
    "num_single_layers": "single_transformer_blocks",
    "n_layers": "layers",
}
"""The options that say how many layers there are, and the lists that hold them."""
_SCALES = {"timestep": 999.0, "guidance": 10.0, "layers": 1.0}
"""Of the random values that inputs are fed with, by what feeds them."""


def transformer(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`. Raises `CheckpointError` for a configuration and weights that are not of one model."""
    config = transformer_config(checkpoint)
    kind, wrap = getattr(diffusers, config["_class_name"]), _wrapper(config["_class_name"], pipeline.parts[name])
    unit, sources = pipeline.latents.multiple, pipeline.wiring.inputs
    shown = bool(pipeline.wiring.inputs_from("picture"))
    channels, most = pipeline.latents.channels, config.get("pos_embed_max_size")
    longest = 20 if most is None else min(20, int(most) * unit)
    if longest < 16:
        raise CheckpointError(
            f"the transformer knows {most} positions a side (pos_embed_max_size), 8 are the least that are supported: "
            "give the configuration that belongs to its weights"
        )
    folder, raw = checkpoint.folder(TRANSFORMER), checkpoint.config(TRANSFORMER)
    with guarded(
        "the transformer cannot be built from its configuration, which is damaged or not supported (give the one that "
        "it was saved with)"
    ):
        known = set(hollow(kind, raw).state_dict())
    stored = set(checkpoint.weights(TRANSFORMER).names.values()) if holds_weights(folder) else known
    spare = sorted(stored - known)
    if spare:
        raise CheckpointError(
            f"{folder} holds weights that its config.json has no place for: "
            f"{', '.join(spare[:3])}{' …' if len(spare) > 3 else ''} ({len(spare)} in all): give the config.json that "
            "belongs to them"
        )
    few = {option: min(2, int(config[option])) for option in _LAYERS if option in config}
    counts = {option: int(config[option]) for option in few}

    def rename(weight: str) -> str:
        """The first layers are the twin's first, the last ones its last."""
        for option, block in _LAYERS.items():
            last = f"{block}.{few.get(option, 0) - 1}."
            if option in few and weight.startswith(last):
                return f"{block}.{counts[option] - 1}.{weight.removeprefix(last)}"
        return weight

    def twin() -> ComponentSpec:
        shorter, doubled = {**raw, **few}, raw.get("dual_attention_layers")
        if doubled and counts["num_layers"] > few["num_layers"]:  # its last layer is the whole's last, not its second
            ends = (0, counts["num_layers"] - 1)
            shorter["dual_attention_layers"] = [i for i, layer in enumerate(ends) if layer in doubled]
        return replace(spec, load=lambda: wrap(load_mapped(kind, folder, shorter, rename)).eval(), twin=None)

    spec = ComponentSpec(
        name=name,
        source=TRANSFORMER,
        twin=twin,
        about_twin=" and ".join(
            f"{few[each]} of {counts[each]} {block}" for each, block in _LAYERS.items() if each in few
        ),
        load=lambda: wrap(load_mapped(kind, folder, raw)).eval(),
        hollow=lambda: wrap(hollow(kind, raw)).to("meta"),
        inputs=pipeline.inputs,
        outputs=(Tensor("out_sample", "float32", ("batch_size", channels, "height", "width")),),
        axes={
            "batch_size": Axis(1, 3),
            "height": Axis(8, longest, unit),
            "width": Axis(8, longest, unit),
            "sequence_length": Axis(8, 77),
            **(dict.fromkeys(PICTURE_SIDES, Axis(8, 20, unit)) if shown else {}),
        },
        scale={name: _SCALES[source] for name, source in sources.items() if source in _SCALES},
        masks=tuple(pipeline.wiring.inputs_from("text.mask")),
        repeat=pipeline.wiring.inputs_from("timestep")[0],
        per_prompt=pipeline.wiring.per_prompt(),
    )
    return spec
