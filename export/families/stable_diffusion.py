"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional U-Net, a KL autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...bundle import CheckpointError, Latents, Prompt, Tensor
from ..checkpoint import Checkpoint
from ..loading import load_pretrained, load_tokenizer
from ..plan import Axis, ComponentPlan

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
)
TASKS = ("txt2img",)
_UPSAMPLERS_OF_ANY_SIZE = 40
"""2^40 divides no latent size, so the U-Net is traced with its upsamplers told the size to reach: any size runs."""


class TextEncoder(torch.nn.Module):
    """Token ids to the last hidden state, the only output that the U-Net reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids).last_hidden_state


class UNet(torch.nn.Module):
    """One denoising prediction."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.num_upsamplers = _UPSAMPLERS_OF_ANY_SIZE

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class VaeEncoder(torch.nn.Module):
    """Pixels to mean and log variance of the latents, concatenated."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.model._encode(sample)


class VaeDecoder(torch.nn.Module):
    """Unscaled latents to pixels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


def components(checkpoint: Checkpoint) -> list[ComponentPlan]:
    """The four models, smallest first. Raises `CheckpointError` for a U-Net with inputs that this family lacks."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    text, unet, vae = (checkpoint.config(name) for name in ("text_encoder", "unet", "vae"))
    _check_unet(unet)
    down = _downscale(vae)
    window = int(text["max_position_embeddings"])
    batch = Axis(1, 3)

    def module(wrapper: type[torch.nn.Module], kind: Any, name: str) -> Any:
        return lambda: wrapper(load_pretrained(kind, checkpoint.folder(name))).eval()

    return [
        ComponentPlan(
            name="text_encoder",
            source="text_encoder",
            load=module(TextEncoder, CLIPTextModel, "text_encoder"),
            inputs=(Tensor("input_ids", "int64", ("batch_size", "sequence_length")),),
            outputs=(Tensor("last_hidden_state", "float32", ("batch_size", "sequence_length", text["hidden_size"])),),
            axes={"batch_size": batch, "sequence_length": Axis(min(window, 8), window)},
            integers={"input_ids": int(text["vocab_size"])},
        ),
        ComponentPlan(
            name="vae_encoder",
            source="vae",
            load=module(VaeEncoder, AutoencoderKL, "vae"),
            inputs=(Tensor("sample", "float32", ("batch_size", vae["in_channels"], "sample_height", "sample_width")),),
            outputs=(
                Tensor(
                    "latent_parameters",
                    "float32",
                    ("batch_size", 2 * vae["latent_channels"], "latent_height", "latent_width"),
                ),
            ),
            axes={
                "batch_size": batch,
                "sample_height": Axis(4 * down, 12 * down, down),
                "sample_width": Axis(4 * down, 12 * down, down),
            },
        ),
        ComponentPlan(
            name="vae_decoder",
            source="vae",
            load=module(VaeDecoder, AutoencoderKL, "vae"),
            inputs=(
                Tensor(
                    "latent_sample", "float32", ("batch_size", vae["latent_channels"], "latent_height", "latent_width")
                ),
            ),
            outputs=(Tensor("sample", "float32", ("batch_size", vae["out_channels"], "height", "width")),),
            axes={"batch_size": batch, "latent_height": Axis(4, 12), "latent_width": Axis(4, 12)},
        ),
        ComponentPlan(
            name="unet",
            source="unet",
            load=module(UNet, UNet2DConditionModel, "unet"),
            inputs=(
                Tensor("sample", "float32", ("batch_size", unet["in_channels"], "height", "width")),
                Tensor("timestep", "float32", ("batch_size",)),
                Tensor(
                    "encoder_hidden_states", "float32", ("batch_size", "sequence_length", unet["cross_attention_dim"])
                ),
            ),
            outputs=(Tensor("out_sample", "float32", ("batch_size", unet["out_channels"], "height", "width")),),
            axes={
                "batch_size": batch,
                "height": Axis(8, 20),
                "width": Axis(8, 20),
                "sequence_length": Axis(min(window, 8), window),
            },
            scale={"timestep": 999.0},
            repeat="timestep",
        ),
    ]


def _check_unet(config: dict[str, Any]) -> None:
    unsupported = {
        "time_cond_proj_dim": "a guidance embedding (LCM)",
        "addition_embed_type": "added embeddings (SDXL)",
        "class_embed_type": "class embeddings",
        "encoder_hid_dim": "projected text embeddings",
        "num_class_embeds": "class embeddings",
    }
    for name, meaning in unsupported.items():
        if config.get(name) is not None:
            raise CheckpointError(
                f"the U-Net takes {meaning} ({name}), which the stable-diffusion family does not support"
            )
    if not isinstance(config.get("cross_attention_dim"), int):
        raise CheckpointError(
            f"the U-Net has cross_attention_dim {config.get('cross_attention_dim')!r}, which is not supported"
        )
    if config.get("in_channels") != config.get("out_channels"):
        raise CheckpointError(
            f"the U-Net takes {config.get('in_channels')} channels (an inpainting or depth model), "
            "which is not supported"
        )


def _downscale(vae: dict[str, Any]) -> int:
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def latents(checkpoint: Checkpoint) -> Latents:
    """How latents relate to pixels."""
    vae = checkpoint.config("vae")
    return Latents(
        channels=int(vae["latent_channels"]),
        downscale=_downscale(vae),
        scaling_factor=float(vae.get("scaling_factor", 0.18215)),
        shift_factor=float(vae.get("shift_factor") or 0.0),
    )


def default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and height that the checkpoint was trained for, in pixels."""
    side = checkpoint.config("unet").get("sample_size")
    if not isinstance(side, int):
        raise CheckpointError("the U-Net configuration has no integer sample_size: add it to unet/config.json")
    pixels = side * _downscale(checkpoint.config("vae"))
    return pixels, pixels


def prompts(checkpoint: Checkpoint, folder: Path) -> dict[str, Prompt]:
    """Write the tokenizer below `folder` and say how it is used."""
    text = checkpoint.config("text_encoder")
    limits = int(text["max_position_embeddings"]), int(text["vocab_size"])
    return {"text_encoder": load_tokenizer(checkpoint.folder("tokenizer"), folder / "tokenizer", *limits)}


def scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler configuration as `StableDiffusionPipeline` mends it: offset 1, no clipped samples."""
    mended = dict(config)
    if "steps_offset" in mended:
        mended["steps_offset"] = 1
    if "clip_sample" in mended:
        mended["clip_sample"] = False
    return mended
