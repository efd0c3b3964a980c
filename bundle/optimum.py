"""Read a folder in the layout of `optimum-cli export onnx` as if it had a manifest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..common.errors import BundleError
from ..common.files import read_json
from .manifest import Component, Latents, Manifest, Prompt, Tensor
from .pipelines import INPAINT_BY_FACTOR, default_side, latent_deviations, scheduler_mends
from .tokens import read_tokens

_FAMILIES = {
    "StableDiffusion": "stable-diffusion",
    "StableDiffusionXL": "stable-diffusion-xl",
    "LatentConsistencyModel": "latent-consistency",
}
_CLASS = re.compile(r"(?:ORT)?(\w+?)(Img2Img|Inpaint)?Pipeline")
_ENCODERS = ("text_encoder", "text_encoder_2")
_COMPONENTS = (*_ENCODERS, "unet", "vae_decoder", "vae_encoder")
_OPTIONS = {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False}
_INPAINT_CHANNELS = 9
_CLIP_TOKENS = 49408
"""The vocabulary of a text encoder whose configuration does not say."""
_DEFAULTS = {"stable-diffusion": (20, 7.5), "stable-diffusion-xl": (20, 5.0), "latent-consistency": (4, 8.5)}


def describe(root: Path) -> Manifest:
    """A manifest for the ONNX folder `root`, without hashes. Raises `BundleError` when it is no such folder."""
    try:
        return _describe(root)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BundleError(f"{root}: a configuration file is damaged ({error}): export the model again") from None


def _describe(root: Path) -> Manifest:
    index = read_json(root / "model_index.json", "the pipeline index")
    class_name = index.get("_class_name")
    named = _CLASS.fullmatch(str(class_name))
    family = _FAMILIES.get(named[1]) if named else None
    if family is None:
        known = ", ".join(f"{name}Pipeline" for name in _FAMILIES)
        raise BundleError(f"{root} holds a {class_name}; without a bundle.json only {known} can be run")
    present = [name for name in _COMPONENTS if (root / name / "model.onnx").is_file()]
    missing = [name for name in ("unet", "vae_decoder") if name not in present]
    if not set(_ENCODERS) & set(present):
        missing.insert(0, "text_encoder")
    if missing:
        raise BundleError(
            f"{root} has no ONNX model for {', '.join(missing)}: it is a checkpoint or an incomplete export; "
            "make a bundle of it with `diffoundry compile`"
        )
    vae = read_json(root / "vae_decoder" / "config.json", "the VAE configuration")
    unet = read_json(root / "unet" / "config.json", "the U-Net configuration")
    blocks = _field(vae, "block_out_channels", list)
    if not blocks:
        raise BundleError(f"{root}: the VAE configuration has no block_out_channels: export the model again")
    downscale = 2 ** (len(blocks) - 1)
    side = default_side(family, _field(unet, "sample_size", int), unet.get("_diffusers_version")) * downscale
    mean, std = latent_deviations(family, vae)
    tasks = _tasks(present, unet, index)
    scheduler = read_json(root / "scheduler" / "scheduler_config.json", "the scheduler configuration")
    return Manifest(
        family=family,
        tasks=tasks,
        precision="as exported",
        components={
            name: Component(f"{name}/model.onnx", "", {}, _unet_inputs(unet, root) if name == "unet" else ())
            for name in present
        },
        files={},
        latents=Latents(
            channels=_field(vae, "latent_channels", int),
            downscale=downscale,
            scaling_factor=float(vae.get("scaling_factor", 0.18215)),
            mean=mean,
            std=std,
        ),
        prompts={name: _prompt(root, name, family) for name in _ENCODERS if name in present},
        default_width=side,
        default_height=side,
        default_steps=_DEFAULTS[family][0],
        default_guidance=_DEFAULTS[family][1],
        options=_options(index) | {INPAINT_BY_FACTOR: bool(mean)} if family == "stable-diffusion-xl" else {},
        scheduler=scheduler_mends(family, tasks, scheduler),
    )


def _options(index: dict[str, Any]) -> dict[str, bool]:
    return {name: bool(index.get(name, default)) for name, default in _OPTIONS.items()}


def _tasks(present: list[str], unet: dict[str, Any], index: dict[str, Any]) -> tuple[str, ...]:
    from_image = ("img2img", "inpaint") if "vae_encoder" in present else ()
    if unet.get("in_channels") == _INPAINT_CHANNELS:
        return from_image[1:]
    return from_image if _options(index)["requires_aesthetics_score"] else ("txt2img", *from_image)


def _unet_inputs(unet: dict[str, Any], root: Path) -> tuple[Tensor, ...]:
    """The inputs that the configuration implies; the model itself is asked when it is loaded."""
    inputs = [
        Tensor("sample", "float32", ("batch_size", _field(unet, "in_channels", int), "height", "width")),
        Tensor("timestep", "float32", ("batch_size",)),
        Tensor("encoder_hidden_states", "float32", ("batch_size", "sequence_length", "width_of_text")),
    ]
    if unet.get("addition_embed_type") == "text_time":
        text = read_json(root / "text_encoder_2" / "config.json", "the text encoder configuration")
        pooled = _field(text, "projection_dim", int)
        ids = _field(unet, "projection_class_embeddings_input_dim", int) - pooled
        count = ids // _field(unet, "addition_time_embed_dim", int)
        inputs.append(Tensor("text_embeds", "float32", ("batch_size", pooled)))
        inputs.append(Tensor("time_ids", "float32", ("batch_size", count)))
    if unet.get("time_cond_proj_dim") is not None:
        width = _field(unet, "time_cond_proj_dim", int)
        inputs.append(Tensor("timestep_cond", "float32", ("batch_size", width)))
    return tuple(inputs)


def _field(config: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(config.get(name), kind) or isinstance(config.get(name), bool):
        raise BundleError(f"the configuration lacks {name!r}: export the model again")
    return config[name]


def _prompt(root: Path, encoder: str, family: str) -> Prompt:
    folder = root / encoder.replace("text_encoder", "tokenizer")
    config = read_json(folder / "tokenizer_config.json", "the tokenizer configuration")
    if (folder / "vocab.json").is_file():
        vocab = read_json(folder / "vocab.json", "the vocabulary")
    else:
        vocab = read_json(folder / "tokenizer.json", "the tokenizer").get("model", {}).get("vocab", {})
    text = read_json(root / encoder / "config.json", "the text encoder configuration")
    tokens = read_tokens(folder)
    known = {**vocab, **tokens.ids(vocab)}
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = tokens.named.get(name, "")
        if known.get(token, _CLIP_TOKENS) >= text.get("vocab_size", _CLIP_TOKENS):
            raise BundleError(f"{folder} has no token {token!r}: export the model again")
        ids[name] = int(known[token])
    window = min(int(config.get("model_max_length", 77)), _field(text, "max_position_embeddings", int))
    start_end_pad = ids["bos_token"], ids["eos_token"], ids["pad_token"]
    if family != "stable-diffusion-xl":
        return Prompt(folder.name, window, *start_end_pad)
    last = _field(text, "num_hidden_layers", int) - 1
    skips = tuple(f"hidden_states.{i}" for i in reversed(range(last)))
    pooled = "text_embeds" if encoder == "text_encoder_2" else ""
    return Prompt(folder.name, window, *start_end_pad, f"hidden_states.{last}", skips, pooled)
