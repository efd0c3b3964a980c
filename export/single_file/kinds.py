"""What a single-file checkpoint is: its family, or what else it looks like.

The original layout is that of the latent-diffusion code: `model.diffusion_model` is the U-Net, `first_stage_model` the
autoencoder, `cond_stage_model` or `conditioner.embedders` hold the text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...common.errors import CheckpointError
from ..weight_files import check_names
from .tokenizer import END
from .weights import Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_PROJECTION = "CLIPTextModelWithProjection"


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder of a family: its folder, where it lies in the file, and of which CLIP it is."""

    name: str
    prefix: str
    open_clip: bool
    class_name: str = "CLIPTextModel"

    @property
    def projects(self) -> bool:
        """Whether the projection of its pooled output is used."""
        return self.class_name == _PROJECTION

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer."""
        return self.name.replace("text_encoder", "tokenizer")

    @property
    def pad_token(self) -> str:
        """What fills its window: OpenCLIP pads with id 0."""
        return "!" if self.open_clip else END


@dataclass(frozen=True, slots=True)
class Family:
    """What shapes cannot tell of a family.

    pipelines: the classes that draw from text and that inpaint. pixels: the side of the pictures it was trained on.
    heads: of every attention in the U-Net, or None for one a 64 channels. sizes: how many numbers (picture size, crop,
    aesthetic score) the U-Net is told beside the pooled text. flags, absent: what model_index.json says beside the
    parts, and the parts that it names without a folder.
    """

    title: str
    text_encoders: tuple[TextEncoder, ...]
    pipelines: tuple[str, str | None]
    pixels: int
    scaling_factor: float
    flags: tuple[tuple[str, bool], ...]
    absent: tuple[str, ...]
    heads: int | None = None
    sizes: int = 0


_SD_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
_SD_FLAGS = (("requires_safety_checker", False),)
_SD_ABSENT = ("feature_extractor", "image_encoder", "safety_checker")
SD1 = Family(
    title="Stable Diffusion 1",
    text_encoders=(TextEncoder("text_encoder", "cond_stage_model.transformer.", open_clip=False),),
    pipelines=_SD_PIPELINES,
    pixels=512,
    scaling_factor=0.18215,
    flags=_SD_FLAGS,
    absent=_SD_ABSENT,
    heads=8,
)
SD2 = Family(
    title="Stable Diffusion 2",
    text_encoders=(TextEncoder("text_encoder", "cond_stage_model.model.", open_clip=True),),
    pipelines=_SD_PIPELINES,
    pixels=512,
    scaling_factor=0.18215,
    flags=_SD_FLAGS,
    absent=_SD_ABSENT,
)
SDXL = Family(
    title="Stable Diffusion XL",
    text_encoders=(
        TextEncoder("text_encoder", "conditioner.embedders.0.transformer.", open_clip=False),
        TextEncoder("text_encoder_2", "conditioner.embedders.1.model.", open_clip=True, class_name=_PROJECTION),
    ),
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"),
    pixels=1024,
    scaling_factor=0.13025,
    flags=(("force_zeros_for_empty_prompt", True),),
    absent=("feature_extractor", "image_encoder"),
    sizes=6,
)
REFINER = Family(
    title="Stable Diffusion XL refiner",
    text_encoders=(TextEncoder("text_encoder_2", "conditioner.embedders.0.model.", True, _PROJECTION),),
    pipelines=("StableDiffusionXLImg2ImgPipeline", None),
    pixels=1024,
    scaling_factor=0.13025,
    flags=(("force_zeros_for_empty_prompt", False), ("requires_aesthetics_score", True)),
    absent=("feature_extractor", "image_encoder", "text_encoder", "tokenizer"),
    sizes=5,
)
FAMILIES = (SD1, SD2, SDXL, REFINER)

_OTHERS = {
    r"lora_(unet|te|down|up|A|B)|\.lora\.|\.hada_w|\.lokr_w": "a LoRA, which changes a checkpoint and is none itself: "
    "give what diffusers saves after `load_lora_weights`, `fuse_lora` and `unload_lora_weights`",
    r"^(string_to_param|emb_params$|clip_[lg]$)": "a textual inversion, which adds to a checkpoint and is none itself",
    r"^control_model\.|^controlnet_|zero_convs\.": "a ControlNet",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter, which adds to a checkpoint and is none itself",
    r"^(adapter\.)?body\.\d+\.": "a T2I-Adapter or an upscaler, which adds to a checkpoint and is none itself",
    r"motion_modules\.": "a motion module of AnimateDiff",
    r"\.time_stack\.|\.time_mixer\.": "a Stable Video Diffusion model",
    r"^edm_(mean|std)$|^edm_vpred\.": "trained in the EDM way (Playground 2.5, CosXL)",
    r"double_blocks\.|single_transformer_blocks\.": "a FLUX model",
    r"joint_blocks\.|^transformer_blocks\.\d+\.norm1_context": "a Stable Diffusion 3 model",
}
"""Names that a supported checkpoint never has."""
_PARTS = {
    rf"^{UNET}(in|out)put_blocks\.": "a U-Net without text encoder (no cond_stage_model.*, no conditioner.embedders.*)",
    r"^(unet\.)?(down_blocks|mid_block)\.": "a U-Net in the diffusers layout: give the folder of a whole checkpoint, "
    "and with --component unet=FOLDER the folder of this file and its config.json",
    r"^(vae\.)?(encoder\.down_blocks|decoder\.up_blocks)\.": "a VAE in the diffusers layout: give the folder of a "
    "whole checkpoint, and with --component vae=FOLDER the folder of this file and its config.json",
    r"^input_blocks\.": f"a U-Net alone, without the prefix {UNET}",
    r"^(first_stage_model\.|vae\.)?(encoder\.down|decoder\.up)\.": "a VAE alone",
    r"^(vision_model|visual)\.": "an image encoder alone",
    r"^(text_model|cond_stage_model|conditioner|embeddings)\.|resblocks\.|^encoder\.block\.": "a text encoder alone",
    r"^model_ema\.": "the moving average (EMA) of a U-Net alone",
    r"^(optimizer|optimizer_states|lr_schedulers)\b": "the state of a training",
}
"""Names that a checkpoint has too, so that they tell something only where it is incomplete."""


def recognise(weights: Weights) -> Family:
    """The family of a whole checkpoint. Raises `CheckpointError`, which says what another file looks like."""
    check_names(weights.path, weights.shapes)
    if not _look(weights, _OTHERS) and _has(weights, UNET):
        for family in FAMILIES:
            if any(_has(weights, text.prefix) for text in family.text_encoders):
                _check_parts(weights, family)
                return family
    like = _look(weights, _OTHERS) or _look(weights, _PARTS)
    found = f"it looks like {like}" if like else f"its tensors are {', '.join(sorted(weights.shapes)[:3]) or 'none'}"
    raise CheckpointError(
        f"{weights.path} is no whole Stable Diffusion 1, 2 or XL checkpoint in the original layout: {found}"
    )


def _has(weights: Weights, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in weights.shapes)


def _look(weights: Weights, table: Mapping[str, str]) -> str | None:
    for pattern, what in table.items():
        if any(re.search(pattern, name) for name in weights.shapes):
            return what
    return None


def _check_parts(weights: Weights, family: Family) -> None:
    absent = [prefix for prefix in (VAE, *(text.prefix for text in family.text_encoders)) if not _has(weights, prefix)]
    if absent:
        raise CheckpointError(
            f"{weights.path} is a {family.title} checkpoint without {' and '.join(f'{name}*' for name in absent)}: "
            "use a file that holds U-Net, VAE and text encoders"
        )
