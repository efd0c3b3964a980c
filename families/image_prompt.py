"""IP-Adapters (Ye et al. 2023): pictures that a denoiser reads beside the text, as configurations say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bundle import Tensor
from ..bundle.wiring import ImagePrompt
from ..common.checks import is_finite
from ..common.errors import CheckpointError
from .control import CONTROLLED, side
from .family import Part, Pipeline

PREFIX = "ip_adapter_"
"""Of the names of components that make tokens of pictures."""
EMBEDS, HIDDEN = "image_embeds", "hidden_states"
"""What an image encoder gives: its projected embedding, and the input of its last layer."""
UNET, FLUX, SD3 = "U-Nets", "FLUX.1", "Stable Diffusion 3"
"""What an adapter was made for."""
TRANSFORMERS = {"FluxTransformer2DModel": FLUX, "SD3Transformer2DModel": SD3}
"""The same by the class of the transformer."""
IMAGE_PROMPT = "ip_"
"""Of the names of inputs that take image prompts."""
TOKENS, SCALE, MASK = "ip_tokens_{}", "ip_scale_{}", "ip_mask_{}"
"""Inputs of the denoiser, by the number of the adapter."""
_USUAL = {"do_normalize": True, "do_resize": True, "do_rescale": True, "resample": 3}
_OF_CLIP = {
    **_USUAL,
    "do_center_crop": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_OF_SIGLIP = {**_USUAL, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_LIKE: dict[str, dict[str, Any]] = {
    UNET: {},
    FLUX: {"negative": "black"},
    SD3: {"negative": "zeros", "stretched": True, "several": False},
}
"""What diffusers' pipelines do with the pictures of each."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What the files of an IP-Adapter say.

    of: what it was made for, `UNET`, `FLUX` or `SD3`. encoder: the component that encodes its pictures, "" where it is
    given embeddings. config: of that encoder. preprocessor: how its pictures are prepared, {} for as CLIP's are, or
    SigLIP's. reads: `EMBEDS` or `HIDDEN`. width: of what it reads. tokens: that it makes of a picture. text_width: of
    what the denoiser's attentions read. layers: of the denoiser that read them. token_width: of a token that is handed
    to the denoiser, 0 for `text_width`.
    """

    of: str
    encoder: str
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    reads: str
    width: int
    tokens: int
    text_width: int
    layers: int
    token_width: int = 0


def halvings(attention: str, blocks: int) -> int:
    """How often the sides of what a cross-attention of a U-Net reads were halved. attention: its name, as diffusers
    has it. blocks: of the way down."""
    part, number, *_ = attention.split(".")
    if part == "mid_block":
        return blocks - 1
    return int(number) if part == "down_blocks" else blocks - 1 - int(number)


def with_image_prompts(
    pipeline: Pipeline,
    adapters: Mapping[str, Adapter],
    of: str,
    text_width: int,
    layers: int,
    levels: Sequence[int] = (),
) -> Pipeline:
    """`pipeline` with IP-Adapters, by the names given to them.

    of: what the denoiser is, `UNET`, `FLUX` or `SD3`. text_width, layers: of the attentions that read tokens. levels:
    of a U-Net's, their `halvings`. Raises `CheckpointError` for one that does not fit it.
    """
    parts, found = dict(pipeline.parts), {}
    denoiser = next(name for name, part in parts.items() if part.role == "denoiser")
    controlled = parts.pop(CONTROLLED.format(denoiser), Part("controlled", parts[denoiser].source))
    for i, (name, adapter) in enumerate(adapters.items()):
        if adapter.of != of:
            raise CheckpointError(
                f"the IP-Adapter {name} is one of {adapter.of}, this checkpoint takes those of {of}: give one that was "
                "trained with this kind of checkpoint"
            )
        for what, own, theirs in (
            ("makes tokens of width", adapter.text_width, text_width),
            (f"is for {'cross-' if of == UNET else ''}attentions, as many as", adapter.layers, layers),
        ):
            if own != theirs:
                raise CheckpointError(
                    f"the IP-Adapter {name} {what} {own}, this checkpoint has {theirs}: it was made for another model; "
                    "give one that was trained with this kind of checkpoint"
                )
        alone = not adapter.encoder
        given = (
            adapter.width if alone else adapter.config["projection_dim" if adapter.reads == EMBEDS else "hidden_size"]
        )
        if given != adapter.width:
            raise CheckpointError(
                f"the IP-Adapter {name} reads {adapter.width} numbers of a picture, its image encoder gives {given}: "
                "give the encoder that it was trained with (--image-encoder FOLDER)"
            )
        if not alone:
            parts[adapter.encoder] = Part("image", adapter.encoder)
        parts[PREFIX + name] = Part("image_prompt", PREFIX + name)
        (r, g, b), (dr, dg, db) = _normal(name, adapter.preprocessor, "SigLIP" if of == SD3 else "CLIP")
        wired = ImagePrompt(
            PREFIX + name,
            adapter.encoder,
            adapter.reads,
            layers,
            TOKENS.format(i),
            SCALE.format(i),
            tuple(side(MASK.format(i), level) for level in sorted(set(levels))),
            1 if alone else int(adapter.config["image_size"]),
            (r, g, b),
            (dr, dg, db),
            **_LIKE[of],
        )
        found[name] = wired
    if adapters:
        parts[CONTROLLED.format(denoiser)] = controlled
    return replace(pipeline, parts=parts, wiring=replace(pipeline.wiring, image_prompts=found))


def _normal(name: str, preprocessor: Mapping[str, Any], kind: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels. kind: `CLIP` or `SigLIP`.

    Raises `CheckpointError` for a preparation of another kind than that.
    """
    usual = _OF_SIGLIP if kind == "SigLIP" else _OF_CLIP
    prepared = {**usual, **preprocessor}
    other = [key for key in usual if key not in ("image_mean", "image_std") and prepared[key] != usual[key]]
    both = [prepared["image_mean"], prepared["image_std"]]
    numbers = [list(each) if isinstance(each, (list, tuple)) else [] for each in both]
    good = all(len(each) == 3 and all(is_finite(number) for number in each) for each in numbers)
    if other or not good or not all(numbers[1]):
        wrong = other[0] if other else "image_mean" if not good else "image_std"
        raise CheckpointError(
            f"the preprocessor_config.json of the image encoder of the IP-Adapter {name} says {wrong} "
            f"{prepared[wrong]!r:.60}: give that of a {kind} image encoder, or take the file away"
        )
    return numbers[0], numbers[1]


def inputs(wired: ImagePrompt, token_width: int, levels: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """The inputs of the denoiser for one adapter.

    Its tokens, in groups that are read apart from each other; a factor for each attention; and where each group is
    read, for each of `levels` in rising order. Without levels there is one group, which is read everywhere.
    """
    groups: tuple[str | int, ...] = ("batch_size", f"{wired.tokens}_groups" if levels else 1)
    sizes = [(side("height", level), side("width", level)) for level in sorted(set(levels))]
    return (
        Tensor(wired.tokens, "float32", (*groups, f"{wired.tokens}_length", token_width)),
        Tensor(wired.scale, "float32", ("batch_size", wired.layers)),
        *(Tensor(name, "float32", (*groups, *size)) for name, size in zip(wired.masks, sizes, strict=True)),
    )
