"""The reader of bundles of schema 1, which had no wiring: what it was follows from the names that they used."""

from __future__ import annotations

from typing import Any

from .reader import FieldError

_ROLES = {
    "text_encoder": "text",
    "text_encoder_2": "text",
    "unet": "denoiser",
    "vae_encoder": "encoder",
    "vae_decoder": "decoder",
    "vae_tiny_decoder": "preview",
    "step": "step",
}
_SOURCES = {
    "sample": "latents",
    "timestep": "timestep",
    "encoder_hidden_states": "text.hidden",
    "text_embeds": "text.pooled",
    "time_ids": "sizes",
    "timestep_cond": "guidance.sinusoid",
}
_TEXT = ("tokenizer", "hidden", "skips", "pooled")
_IDS = ("max_length", "bos_token_id", "eos_token_id", "pad_token_id")


def upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """A manifest of schema 1 as one of schema 2. Raises `FieldError` for what it lacks; types are checked later."""
    prompts, components, options = (_object(old, name, {}) for name in ("prompts", "components", "options"))
    if not prompts:
        raise FieldError("prompts is missing or empty")
    denoiser = _object(components, "unet", None, "components.")
    latents = _object(old, "latents", None)
    text, tokenizers = [], {}
    for name, prompt in prompts.items():
        if not isinstance(prompt, dict) or not isinstance(prompt.get("tokenizer"), str):
            raise FieldError(f"prompts.{name}.tokenizer is missing")
        own = {key: prompt[key] for key in _TEXT if key in prompt}
        text.append({"component": name, "text": int(name.endswith("_2")), **own})
        tokenizers[prompt["tokenizer"]] = {key: prompt[key] for key in _IDS if key in prompt}
    return {
        **old,
        "components": {name: _component(name, part) for name, part in components.items()},
        "wiring": {
            "text": text,
            "inputs": _inputs(denoiser, latents, bool(options.get("requires_aesthetics_score"))),
            "empty_negative_is_zeros": options.get("force_zeros_for_empty_prompt", False),
            "strength_by_sampler": old.get("family") == "latent-consistency",
        },
        "tokenizers": tokenizers,
        "latents": {
            **latents,
            "encoded": "sample" if options.get("tiny_autoencoder") else "parameters",
            "inpaint_by_factor": options.get("inpaint_by_factor", False),
        },
    }


def _object(value: dict[str, Any], name: str, default: dict[str, Any] | None, path: str = "") -> dict[str, Any]:
    found = value.get(name, default)
    if not isinstance(found, dict):
        raise FieldError(f"{path}{name} must be an object" if name in value else f"{path}{name} is missing")
    return found


def _inputs(denoiser: dict[str, Any], latents: dict[str, Any], scored: bool) -> dict[str, str]:
    listed = denoiser.get("inputs")
    found = {}
    for tensor in listed if isinstance(listed, list) else ():
        name, shape = (tensor.get("name"), tensor.get("shape")) if isinstance(tensor, dict) else (None, None)
        if name not in _SOURCES:
            raise FieldError(f"components.unet.inputs holds {name!r:.60}, which has no meaning")
        found[str(name)] = _SOURCES[str(name)]
        channels = latents.get("channels")
        masked = isinstance(channels, int) and isinstance(shape, list) and shape[1:2] == [2 * channels + 1]
        if name == "sample" and masked:
            found["sample"] = "latents.masked"
    if scored and "time_ids" in found:
        found["time_ids"] = "sizes.scored"
    return found


def _component(name: str, part: Any) -> dict[str, Any]:
    """Of the files, those of the graphs and their weights go to the variants."""
    path = f"components.{name}"
    if name not in _ROLES:
        raise FieldError(f"{path} has no meaning")
    if not isinstance(part, dict) or not isinstance(part.get("files"), dict) or not isinstance(part.get("model"), str):
        raise FieldError(f"{path} has no model or no files")
    files, model = part["files"], part["model"]
    variants: dict[str, Any] = {
        "fp32/onnx": {"model": model, "files": {key: files[key] for key in files if key in (model, f"{model}_data")}}
    }
    if part.get("fused"):
        variants["fp32/onnxruntime:cpu"] = {
            "model": part["fused"],
            "per_prompt": part.get("hoisted", ""),
            "files": {key: sha for key, sha in files.items() if not key.endswith(".json")},
        }
    typed = part.get("typed", {})
    for precision, variant in typed.items() if isinstance(typed, dict) else ():
        variants[f"{precision}/onnx"] = variant
    return {
        "role": _ROLES[name],
        "inputs": part.get("inputs", []),
        "outputs": part.get("outputs", []),
        "key": part.get("key", ""),
        "variants": variants,
        "files": {key: sha for key, sha in files.items() if key.endswith(".json")},
    }
