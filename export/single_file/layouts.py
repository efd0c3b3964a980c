"""What a single-file checkpoint is: its layout, or what else it looks like.

The original layout is that of the latent-diffusion code: `model.diffusion_model` is the U-Net, `first_stage_model` the
autoencoder, `cond_stage_model` or `conditioner.embedders` hold the text encoders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ...common.errors import CheckpointError
from ..weight_files import check_names
from .tokenizer import END
from .weights import Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder of a layout: its folder, the prefix of its weights in the file, and of which CLIP it is."""

    name: str
    prefix: str
    open_clip: bool

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer."""
        return self.name.replace("text_encoder", "tokenizer")

    @property
    def pad_token(self) -> str:
        """What fills its window: OpenCLIP pads with id 0."""
        return "!" if self.open_clip else END


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind of single file.

    title: also the name of the file of its published configurations. sizes: how many numbers (picture size, crop,
    aesthetic score) the U-Net reads beside the pooled text.
    """

    title: str
    text_encoders: tuple[TextEncoder, ...]
    sizes: int = 0

    @property
    def models(self) -> tuple[str, ...]:
        """The folders of its models."""
        return (*(text.name for text in self.text_encoders), "unet", "vae")

    def published(self) -> dict[str, dict[str, Any]]:
        """What its configurations say that shapes do not: `model_index`, one entry a folder, and `forms`.

        A form is what inpainting, another prediction or a last step of pure noise change in the others.
        """
        name = self.title.lower().replace(" ", "-")
        return dict(json.loads((files(__package__) / "data" / f"{name}.json").read_text(encoding="utf-8")))


SD1 = Layout(
    "Stable Diffusion 1",
    (TextEncoder("text_encoder", "cond_stage_model.transformer.", open_clip=False),),
)
SD2 = Layout(
    "Stable Diffusion 2",
    (TextEncoder("text_encoder", "cond_stage_model.model.", open_clip=True),),
)
SDXL = Layout(
    "Stable Diffusion XL",
    (
        TextEncoder("text_encoder", "conditioner.embedders.0.transformer.", open_clip=False),
        TextEncoder("text_encoder_2", "conditioner.embedders.1.model.", open_clip=True),
    ),
    sizes=6,
)
REFINER = Layout(
    "Stable Diffusion XL refiner",
    (TextEncoder("text_encoder_2", "conditioner.embedders.0.model.", open_clip=True),),
    sizes=5,
)
LAYOUTS = (SD1, SD2, SDXL, REFINER)

_FLUX, _SD3 = (
    r"double_blocks\.|single_transformer_blocks\.",
    r"joint_blocks\.|(^|\.)transformer_blocks\.\d+\.norm1_context",
)
_Z_IMAGE = r"(^|\.)cap_pad_token$|(^|\.)layers\.0\.adaLN_modulation\.0\."
_OTHERS = {
    r"lora_(unet|te|down|up|A|B)|\.lora\.|_lora\d?\.(down|up)\.|\.hada_w|\.lokr_w": "a LoRA, which changes a "
    "checkpoint and is none itself: give what diffusers saves after `load_lora_weights`, `fuse_lora` and "
    "`unload_lora_weights`",
    r"^(string_to_param|emb_params$|clip_[lg]$)": "a textual inversion, which adds to a checkpoint and is none itself",
    r"^control_model\.|^controlnet_|zero_convs\.": "a ControlNet",
    r"^(ip_adapter|image_proj)\.|\.ip_adapter_": "an IP-Adapter, which adds to a checkpoint and is none itself",
    r"^(adapter\.)?body\.\d+\.": "a T2I-Adapter or an upscaler, which adds to a checkpoint and is none itself",
    r"motion_modules\.": "a motion module of AnimateDiff",
    r"\.time_stack\.|\.time_mixer\.": "a Stable Video Diffusion model",
    r"^edm_(mean|std)$|^edm_vpred\.": "trained in the EDM way (Playground 2.5, CosXL)",
    r"distilled_guidance_layer\.": "a Chroma model",
    r"_stream_modulation": "a FLUX.2 model",
    r"individual_token_refiner\.": "a HunyuanVideo model",
    _FLUX: "a FLUX model: compile it with --config FOLDER, the diffusers folder of one",
    _SD3: "a Stable Diffusion 3 model: compile it with --config FOLDER, the diffusers folder of one",
    _Z_IMAGE: "a Z-Image model: compile it with --config FOLDER, the diffusers folder of one",
}
"""Names that a checkpoint with a U-Net never has."""
_FLOW = {
    _OTHERS[_FLUX]: "FluxTransformer2DModel",
    _OTHERS[_SD3]: "SD3Transformer2DModel",
    _OTHERS[_Z_IMAGE]: "ZImageTransformer2DModel",
}
_PARTS = {
    rf"^{UNET}(in|out)put_blocks\.": "a U-Net without text encoder (no cond_stage_model.*, no "
    "conditioner.embedders.*): compile a whole checkpoint, with --component unet=FILE, this file",
    r"^(unet\.)?(down_blocks|mid_block)\.": "a U-Net in the diffusers layout: compile a whole checkpoint, with "
    "--component unet=FILE, this file",
    r"^(vae\.)?(encoder\.down_blocks|decoder\.up_blocks)\.": "a VAE in the diffusers layout: compile a whole "
    "checkpoint, with --component vae=FILE, this file",
    r"^input_blocks\.": f"a U-Net alone, without the prefix {UNET}: compile a whole checkpoint, with --component "
    "unet=FILE, this file",
    r"^(first_stage_model\.|vae\.)?(encoder\.down|decoder\.up)\.": "a VAE alone: compile a whole checkpoint, with "
    "--component vae=FILE, this file",
    r"^(vision_model|visual)\.": "an image encoder alone",
    r"^(text_model|cond_stage_model|conditioner|embeddings)\.|resblocks\.|^encoder\.block\.": "a text encoder alone: "
    "compile a whole checkpoint, with --component text_encoder=FILE, this file",
    r"^model_ema\.": "the moving average (EMA) of a U-Net alone",
    r"^(optimizer|optimizer_states|lr_schedulers)\b": "the state of a training",
}
"""Names that a checkpoint has too, so that they mean something only where it is incomplete."""


_AS_PART = "compile the folder of that, with --component NAME=FILE, this file"


def recognise(weights: Weights, needs_vae: bool = True) -> Layout:
    """The layout of a whole checkpoint. Raises `CheckpointError`, which says what another file looks like.

    needs_vae: whether there must be an autoencoder in it.
    """
    check_names(weights.path, weights.shapes)
    other = _look(weights, _OTHERS)
    if not other and weights.has(UNET):
        for layout in LAYOUTS:
            if any(weights.has(text.prefix) for text in layout.text_encoders):
                _check_parts(weights, layout, needs_vae)
                return layout
    like = other or _look(weights, _PARTS)
    shown = ", ".join(sorted(weights.shapes)[:3]) or "none"
    found = (
        f"it looks like {like}" if like else f"its tensors are {shown}: where it is a part of a checkpoint, {_AS_PART}"
    )
    raise CheckpointError(
        f"{weights.path} is no whole Stable Diffusion 1, 2 or XL checkpoint in the original layout: {found}"
    )


def looks_like(weights: Weights) -> str | None:
    """What else a file holds than what was looked for, None for what is not known."""
    found = _look(weights, _OTHERS) or _look(weights, _PARTS)
    return found and re.split(r"[,:]", found)[0]


def transformer_kind(weights: Weights) -> str | None:
    """The class of the transformer in a file of FLUX.1, Stable Diffusion 3 or Z-Image, None for one of another kind."""
    return _FLOW.get(_look(weights, _OTHERS) or "")


def _look(weights: Weights, table: Mapping[str, str]) -> str | None:
    names = "\n".join(weights.shapes)
    return next((what for pattern, what in table.items() if re.search(pattern, names, re.MULTILINE)), None)


def _check_parts(weights: Weights, layout: Layout, needs_vae: bool) -> None:
    due = ([VAE] if needs_vae else []) + [text.prefix for text in layout.text_encoders]
    absent = [prefix for prefix in due if not weights.has(prefix)]
    if absent:
        other = ", or give its autoencoder with --component vae=FILE" if absent == [VAE] else ""
        raise CheckpointError(
            f"{weights.path} is a {layout.title} checkpoint without {' and '.join(f'{name}*' for name in absent)}: "
            f"use a file that holds U-Net, VAE and text encoders{other}"
        )
