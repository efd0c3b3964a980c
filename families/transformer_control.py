"""ControlNets of transformers: what they are given, and after which blocks their residuals are added."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bundle import Tensor
from ..bundle.wiring import MOST_MODES, Control
from ..common.errors import CheckpointError
from .control import CONTROLLED, PREFIX, tokens
from .family import Part, Pipeline

SD3, FLUX = "SD3ControlNetModel", "FluxControlNetModel"
CONTROLNETS = {"SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}
"""The class of the ControlNets of each class of transformers."""
FLUX_MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")
"""What the pictures of a ControlNet-Union of FLUX.1 are of, by the numbers that its authors gave them."""
OF_PROMPT = {"prompt_hidden_states": "text.hidden", "prompt_pooled_projections": "text.pooled"}
"""Inputs of a ControlNet of FLUX.1, which reads the prompt for the rows of the negative prompt, too."""
_FLUX_PATCH = 2
_MOST_PATCH = 16
_LEAST_POSITIONS = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """After which blocks of a transformer the residuals of a ControlNet are added.

    name: the same for all that are laid out so. blocks, single_blocks: for each block of the transformer the number
    of the residual that is added after it, None for none.
    """

    name: str
    blocks: tuple[int | None, ...]
    single_blocks: tuple[int | None, ...] = ()

    def block(self, i: int) -> str | None:
        """The residual that is added after block i, None for none."""
        return None if self.blocks[i] is None else f"controlnet_block_sample_{self.blocks[i]}_of_{self.name}"

    def single_block(self, i: int) -> str | None:
        """The residual that is added after single block i, None for none."""
        number = self.single_blocks[i]
        return None if number is None else f"controlnet_single_block_sample_{number}_of_{self.name}"

    @property
    def residuals(self) -> tuple[str, ...]:
        """Those that are added anywhere, in the order in which a ControlNet makes them."""
        found = [self.block(i) for i in range(len(self.blocks))]
        found += [self.single_block(i) for i in range(len(self.single_blocks))]
        return tuple(dict.fromkeys(name for name in found if name is not None))

    def numbers(self) -> tuple[list[int], list[int]]:
        """The numbers of these, among those of blocks and among those of single blocks."""
        return _numbers(self.blocks), _numbers(self.single_blocks)

    def ends(self) -> Layout:
        """That of a transformer with its first and its last block of each kind alone."""
        first_and_last = [each if len(each) < 3 else (each[0], each[-1]) for each in (self.blocks, self.single_blocks)]
        return Layout(self.name, *first_and_last)


def _numbers(places: Sequence[int | None]) -> list[int]:
    return list(dict.fromkeys(number for number in places if number is not None))


def layout(config: Mapping[str, Any], transformer: Mapping[str, Any]) -> Layout:
    """That of a ControlNet in a transformer of these configurations, as the transformer's class adds residuals.

    Those of Stable Diffusion 3 are spread evenly, and the last block, which has no text to give on, gets none. Those of
    FLUX.1 are each added after as many blocks, rounded up, so that the last ones may be added nowhere; where pixels are
    read, they are taken in turn.
    """
    made, blocks = int(config["num_layers"]), int(transformer["num_layers"])
    if transformer["_class_name"] == "SD3Transformer2DModel":
        share = blocks / made if made else 0.0
        return Layout(f"{made}", (*(int(i / share) if made else None for i in range(blocks - 1)), None))
    singles, single_blocks = int(config["num_single_layers"]), int(transformer["num_single_layers"])
    in_turn = reads_pixels(config)
    return Layout(
        f"{made}_{singles}{'_in_turn' if in_turn else ''}",
        tuple(i % made for i in range(blocks)) if in_turn and made else _spread(made, blocks),
        _spread(singles, single_blocks),
    )


def _spread(made: int, blocks: int) -> tuple[int | None, ...]:
    every = math.ceil(blocks / made) if made else 1
    return tuple(i // every if made else None for i in range(blocks))


def reads_pixels(config: Mapping[str, Any]) -> bool:
    """Whether a ControlNet of this configuration makes tokens of pixels by itself."""
    return config.get("conditioning_embedding_channels") is not None


def width(config: Mapping[str, Any]) -> int:
    """The numbers of a token in a transformer of this configuration, or in a ControlNet."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def residuals(made: Layout, transformer: Mapping[str, Any], patch: int) -> tuple[Tensor, ...]:
    """What a ControlNet gives. patch: latents a side of a token."""
    shape = ("batch_size", tokens(patch), width(transformer))
    return tuple(Tensor(name, "float32", shape) for name in made.residuals)


def with_controlnets(
    pipeline: Pipeline, transformer: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]
) -> Pipeline:
    """`pipeline` with ControlNets, by the names given to them. transformer, controls: their configurations.

    Raises `CheckpointError` for one that was made for another transformer.
    """
    parts, found = dict(pipeline.parts), {}
    denoiser = next(name for name, part in parts.items() if part.role == "denoiser")
    if set(pipeline.wiring.inputs_from("latents")) != {"sample"} or pipeline.wiring.edits:
        raise CheckpointError(
            f"{next(iter(controls))} is a ControlNet, the transformer of this checkpoint sees a picture by itself: "
            "they do not go together; leave it out"
        )
    if parts[denoiser].wrapper:
        raise CheckpointError(
            f"the wrapper {parts[denoiser].wrapper} of the transformer takes no ControlNet: leave out "
            f"{next(iter(controls))}"
        )
    of_flux = transformer["_class_name"] == "FluxTransformer2DModel"
    for name, config in controls.items():
        _check(name, config, transformer, pipeline)
        parts[PREFIX + name] = Part("control", PREFIX + name)
        found[name] = (_flux if of_flux else _sd3)(name, config, transformer, pipeline)
    parts[CONTROLLED.format(denoiser)] = Part("controlled", parts[denoiser].source)
    return replace(pipeline, parts=parts, wiring=replace(pipeline.wiring, controls=found))


def _sd3(name: str, config: Mapping[str, Any], transformer: Mapping[str, Any], pipeline: Pipeline) -> Control:
    extra = config["extra_conditioning_channels"]
    if extra not in (0, 1):
        raise CheckpointError(
            f"the ControlNet {name} takes {extra} channels beside the picture (extra_conditioning_channels), which is "
            "not supported; none or one, a mask, is"
        )
    most = config["pos_embed_max_size"] if config["use_pos_embed"] else None
    if most is not None and most < _LEAST_POSITIONS:
        raise CheckpointError(
            f"the ControlNet {name} knows {most} positions a side (pos_embed_max_size), {_LEAST_POSITIONS} are the "
            "least that are supported: give the configuration that belongs to its weights"
        )
    return Control(
        PREFIX + name,
        len(layout(config, transformer).residuals),
        pipeline.latents.channels + extra,
        most=0 if most is None else int(most) * int(config["patch_size"]),
        reads="latents",
        # as the pipelines of diffusers: that for masks shifts in any case
        shifted=bool(extra) or not config["force_zeros_for_pooled_projection"],
        masked=bool(extra),
        guess=False,
    )


def _flux(name: str, config: Mapping[str, Any], transformer: Mapping[str, Any], pipeline: Pipeline) -> Control:
    pixels, modes = reads_pixels(config), config["num_mode"]
    if modes is not None and not (isinstance(modes, int) and 1 <= modes <= MOST_MODES):
        raise CheckpointError(
            f"the ControlNet {name} says num_mode {modes!r:.40} in its config.json, where it must be from 1 to "
            f"{MOST_MODES}: give the file that came with its weights"
        )
    return Control(
        PREFIX + name,
        len(layout(config, transformer).residuals),
        3 if pixels else pipeline.latents.channels,
        kind="controlnet" if modes is None else "union",
        modes=modes or 0,
        mode_names=FLUX_MODES[:modes] if modes else (),
        reads="signed" if pixels else "drawn",
        guess=False,
        of_prompt=OF_PROMPT,
    )


def _check(name: str, config: Mapping[str, Any], transformer: Mapping[str, Any], pipeline: Pipeline) -> None:
    """Raise `CheckpointError` unless a ControlNet of this configuration fits the transformer of that one."""
    flow, channels = pipeline.wiring.flow, pipeline.latents.channels
    patch = 1 if flow is None else flow.patch
    pairs = [
        ("has tokens of width", width(config), width(transformer)),
        ("takes numbers a token", config["in_channels"], transformer["in_channels"]),
    ]
    if transformer["_class_name"] == "SD3Transformer2DModel":
        pairs.append(("has patches of", config["patch_size"], transformer["patch_size"]))
        own_text, forced = config["joint_attention_dim"] is not None, config["force_zeros_for_pooled_projection"]
    else:
        own_text, forced = True, False
        if reads_pixels(config):
            made = int(config["conditioning_embedding_channels"]) * int(config["patch_size"]) ** 2
            pairs.append(("makes numbers of a token of pixels", made, channels * _FLUX_PATCH**2))
    if own_text:
        pairs.append(("reads text of width", config["joint_attention_dim"], transformer["joint_attention_dim"]))
    if not forced:
        pairs.append(("takes pooled text of", config["pooled_projection_dim"], transformer["pooled_projection_dim"]))
    for what, own, theirs in pairs:
        if own != theirs:
            raise CheckpointError(
                f"the ControlNet {name} {what} {own}, this checkpoint {theirs}: it was made for another model; "
                "give one that was trained with this kind of checkpoint"
            )
    if not layout(config, transformer).residuals:
        raise CheckpointError(f"the ControlNet {name} has no layers (num_layers), and would add nothing: leave it out")
    if patch > _MOST_PATCH or patch & (patch - 1):
        raise CheckpointError(f"a transformer with patches of {patch} takes no ControlNet: leave {name} out")
