"""What single files call the weights of a part of a checkpoint: transformers, U-Nets, autoencoders and text encoders.

A file has the names of the original authors, of diffusers or of transformers, with one of several prefixes or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...families.original_transformer import TRANSFORMERS, originals
from ...families.parts import KL, UNET
from .names import clip_names, unet_names, vae_names
from .weights import Weights

HALVES, TRANSPOSED, IDENTITY = "halves", "transposed", "identity"
T5, CLIP, PROJECTED_CLIP = "T5EncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection"
_PROJECTION = "text_projection.weight"
_DENOISER = ("model.diffusion_model.", "diffusion_model.")
_PREFIXES = {
    "transformer": (*_DENOISER, "transformer."),
    "unet": (*_DENOISER, "unet."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        *("text_encoders.clip_l.transformer.", "clip_l.transformer.", "conditioner.embedders.0.transformer."),
        *("cond_stage_model.transformer.", "cond_stage_model.model.", "text_encoder."),
    ),
    "text_encoder_2": (
        *("text_encoders.clip_g.transformer.", "clip_g.transformer.", "conditioner.embedders.1.model."),
        *("conditioner.embedders.0.model.", "text_encoder_2."),
    ),
}
QWEN3 = "Qwen3Model"
_OF_KIND = {
    T5: ("text_encoders.t5xxl.transformer.", "t5xxl.transformer."),
    QWEN3: ("text_encoders.qwen3_4b.transformer.model.", "model."),
}
"""By class, of text encoders that are anywhere called alike."""
_MARKS = {QWEN3: "layers.0.self_attn."}
"""By class, what follows the prefix, where others may begin with that too."""
_OTHERS = re.compile(
    r"(model\.diffusion_model|diffusion_model|vae|first_stage_model|text_encoders?(_\d)?|conditioner|cond_stage_model|"
    r"model_ema|clip_[lg]|t5xxl)\."
)
"""How names of other parts begin in a file where those of a part have no prefix."""
_SCALES = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$")
_OF_CLIP = r"(text_model\.)?embeddings\.position_ids|logit_scale|logit_bias|(vision_model|visual|visual_projection)\..*"
_BESIDE = {
    CLIP: rf"{_OF_CLIP}|text_projection(\.weight)?",
    PROJECTED_CLIP: _OF_CLIP,
    T5: r"decoder\..*|lm_head\..*|spiece_model|shared\.weight|encoder\.embed_tokens\.weight",
    QWEN3: r"lm_head\..*",
    KL: r"loss\..*",
    "ZImageTransformer2DModel": r"norm_final\.weight",
}
"""By class what stands beside its weights in files, and is not read: the image side of a CLIP, the decoder of a T5."""
_OLD_ATTENTION = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))
"""What diffusers called the attention of an autoencoder up to version 0.16."""


class Origin(NamedTuple):
    """What a weight of a model is in a file. order: of those that are the rows of one tensor.

    turn: what is done with it: its `halves` change places, it is `transposed`, or it is not there and is the
    `identity`.
    """

    name: str
    order: int = 0
    turn: str = ""


def prefixes(component: str, kind: str) -> tuple[str, ...]:
    """What the names of a component may begin with in a file that holds others too. kind: its class."""
    own = (f"{component}.",)
    return (*_OF_KIND[kind], *own) if kind in _OF_KIND else _PREFIXES.get(component, own)


def held(weights: Weights, component: str, kind: str) -> bool:
    """Whether a file that holds several parts holds this one. kind: its class."""
    return any(weights.has(prefix + _MARKS.get(kind, "")) for prefix in prefixes(component, kind))


def is_scale(name: str) -> bool:
    """Whether a tensor belongs to weights in eight bits."""
    return bool(_SCALES.search(name))


def namings(
    component: str, kind: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, Origin]]:
    """The ways in which files name the weights of a model, each without a prefix.

    kind: its class. config: its configuration. shapes: of its weights, by their published names.
    """
    own = {name: Origin(name) for name in shapes}
    if kind in TRANSFORMERS:
        theirs = originals(kind, shapes)
        if theirs.keys() == shapes.keys():
            yield {name: Origin(each.name, each.order, HALVES * each.swapped) for name, each in theirs.items()}
    elif kind == UNET and isinstance(config.get("layers_per_block", 2), int):
        yield _named(unet_names(shapes, int(config.get("layers_per_block", 2))))
    elif kind == KL:
        levels = {found[1] for name in shapes if (found := re.match(r"encoder\.down_blocks\.(\d+)\.", name))}
        yield _named(vae_names(shapes, len(levels)))
        yield _named({name: _of_old(name) for name in shapes})
    elif kind in (CLIP, PROJECTED_CLIP):
        yield from _clip_namings(component, kind, shapes)
    elif kind == T5:
        yield {**own, "shared.weight": Origin("encoder.embed_tokens.weight")}
    yield own


def _clip_namings(component: str, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Origin]]:
    bare = _named({name: name.removeprefix("text_model.") for name in shapes})
    for naming in (_named({name: name for name in shapes}), bare):
        yield naming
        # Stability AI's and ComfyUI's files of CLIP-L leave out its projection, which Stable Diffusion 3 does without
        if kind == PROJECTED_CLIP and component == "text_encoder" and len(set(shapes[_PROJECTION])) == 1:
            yield {**naming, _PROJECTION: Origin("", turn=IDENTITY)}
    made = {}
    for name, original in clip_names(shapes, open_clip=True).items():
        rows = re.search(r"\.self_attn\.([qkv])_proj\.", name)
        order = "qkv".index(rows[1]) if rows else 0
        made[name] = Origin(original, order, TRANSPOSED if name == _PROJECTION else "")
    yield made


def _named(names: Mapping[str, str]) -> dict[str, Origin]:
    return {name: Origin(original) for name, original in names.items()}


def _of_old(name: str) -> str:
    for new, old in _OLD_ATTENTION:
        name = name.replace(new, old) if ".mid_block.attentions." in name else name
    return name


def is_beside(name: str, prefix: str, kind: str, layers: object) -> bool:
    """Whether a tensor that a part does not read may stand in its file.

    prefix: of the part's names. layers: of a CLIP; Stable Diffusion 2 leaves out the last layer of its own.
    """
    if not name.startswith(prefix) or (not prefix and _OTHERS.match(name)) or _SCALES.search(name):
        return True
    rest = name.removeprefix(prefix)
    last = kind == CLIP and rest.startswith(f"transformer.resblocks.{layers}.")
    return last or bool(kind in _BESIDE and re.fullmatch(_BESIDE[kind], rest))
