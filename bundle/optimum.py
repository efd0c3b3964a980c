"""Read a folder in the layout of `optimum-cli export onnx` as if it had a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import BundleError
from .files import read_json
from .manifest import Component, Latents, Manifest, Prompt

_FAMILIES = {
    "StableDiffusionPipeline": "stable-diffusion",
    "ORTStableDiffusionPipeline": "stable-diffusion",
}
_COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def describe(root: Path) -> Manifest:
    """A manifest for the ONNX folder `root`, without hashes. Raises `BundleError` when it is no such folder."""
    try:
        return _describe(root)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BundleError(f"{root}: a configuration file is damaged ({error}): export the model again") from None


def _describe(root: Path) -> Manifest:
    index = read_json(root / "model_index.json", "the pipeline index")
    class_name = index.get("_class_name")
    family = _FAMILIES.get(str(class_name))
    if family is None:
        raise BundleError(f"{root} holds a {class_name}; without a bundle.json only {', '.join(_FAMILIES)} can be run")
    present = [name for name in _COMPONENTS if (root / name / "model.onnx").is_file()]
    missing = [name for name in ("text_encoder", "unet", "vae_decoder") if name not in present]
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
    side = _field(unet, "sample_size", int) * downscale
    return Manifest(
        family=family,
        tasks=("txt2img",),
        precision="as exported",
        components={name: Component(model=f"{name}/model.onnx", dtype="", files={}) for name in present},
        files={},
        latents=Latents(
            channels=_field(vae, "latent_channels", int),
            downscale=downscale,
            scaling_factor=float(vae.get("scaling_factor", 0.18215)),
            shift_factor=float(vae.get("shift_factor") or 0.0),
        ),
        prompts={"text_encoder": _prompt(root)},
        default_width=side,
        default_height=side,
    )


def _field(config: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(config.get(name), kind) or isinstance(config.get(name), bool):
        raise BundleError(f"the configuration lacks {name!r}: export the model again")
    return config[name]


def _prompt(root: Path) -> Prompt:
    folder = root / "tokenizer"
    config = read_json(folder / "tokenizer_config.json", "the tokenizer configuration")
    if (folder / "vocab.json").is_file():
        vocab = read_json(folder / "vocab.json", "the vocabulary")
    else:
        vocab = read_json(folder / "tokenizer.json", "the tokenizer").get("model", {}).get("vocab", {})
    ids = {}
    for name, default in (("bos", "<|startoftext|>"), ("eos", "<|endoftext|>"), ("pad", "<|endoftext|>")):
        token = config.get(f"{name}_token", default)
        token = token.get("content", default) if isinstance(token, dict) else token
        if token not in vocab:
            raise BundleError(f"{folder} has no token {token!r}: export the model again")
        ids[f"{name}_token_id"] = int(vocab[token])
    text = read_json(root / "text_encoder" / "config.json", "the text encoder configuration")
    window = min(int(config.get("model_max_length", 77)), _field(text, "max_position_embeddings", int))
    return Prompt("tokenizer", window, ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"])
