"""LoRAs with random weights, in each of the forms that diffusers loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..families.original import unet_names

KINDS = ("peft", "mixed", "stabilised", "dora", "processor", "kohya", "original")
"""peft: as diffusers saves them. mixed: with several ranks and no alpha. stabilised: the scale is alpha/√rank, as the
metadata say. dora: with magnitudes. processor: as diffusers saved them before PEFT. kohya, original: as kohya's trainer
does, with convolutions; in the second the U-Net of XL has the names of its authors."""
_RANK, _ALPHA = 4, 2.0
_ATTENTION = re.compile(r"\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$")
_OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}


def write_lora(checkpoint: Path, kind: str, file: Path) -> None:
    """Write a LoRA of this kind for a checkpoint, of weights that change what is drawn a little."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(KINDS.index(kind))
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    denoiser = "unet" if (checkpoint / "unet").is_dir() else "transformer"
    layers = json.loads((checkpoint / denoiser / "config.json").read_text()).get("layers_per_block")
    found = list(_modules(checkpoint, denoiser))
    weights = [f"{module}.weight" for component, module, _ in found if component == denoiser]
    originals = unet_names(weights, layers) if layers else {}
    for component, module, weight in found:
        is_text, flat = component != denoiser, weight.ndim == 2
        if not flat and kind not in ("kohya", "original"):
            continue
        if kind in ("dora", "processor") and not _ATTENTION.search(module):
            continue
        if kind in ("dora", "mixed", "stabilised") and is_text:
            continue
        rank = _RANK if kind != "mixed" else 2 + len(module) % 3
        size = 0.2 * float(weight.std()) ** 0.5 / weight[0].numel() ** 0.25
        down = torch.randn(rank, *weight.shape[1:]) * size
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2)) * size
        if kind in ("kohya", "original"):
            named = _kohya(component, module, originals if kind == "original" else {})
            tensors |= {f"{named}.lora_down.weight": down, f"{named}.lora_up.weight": up}
            tensors[f"{named}.alpha"] = torch.tensor(_ALPHA)
        elif kind == "processor":
            outer, _, last = module.rpartition(".")
            if last == "0":  # of to_out.0
                outer, last = outer.removesuffix(".to_out"), "to_out.0"
            place = f"{outer}.processor" if not is_text else outer
            named = f"{component}.{place}.{_OLD.get(last, last)}_lora"
            tensors |= {f"{named}.down.weight": down, f"{named}.up.weight": up}
        else:
            named = f"{component}.{module}"
            tensors |= {f"{named}.lora_A.weight": down, f"{named}.lora_B.weight": up}
            if kind == "dora":
                tensors[f"{named}.lora_magnitude_vector"] = weight.norm(dim=1) * (1 + 0.05 * torch.rand(len(weight)))
            if kind == "stabilised":
                stated = {"r": rank, "lora_alpha": _ALPHA, "use_rslora": True, "target_modules": []}
                metadata = {f"unet.{name}": value for name, value in stated.items()}  # type: ignore[misc]
    if kind == "stabilised":
        targets = [name.removeprefix("unet.").removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
        metadata["unet.target_modules"] = targets  # type: ignore[assignment]
        save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(metadata), "format": "pt"})
        return
    save_file(tensors, file)


def _modules(checkpoint: Path, denoiser: str) -> Iterator[tuple[str, str, Any]]:
    """Component, module and weight of each linear layer and convolution of the denoiser and the CLIP text encoders."""
    from safetensors import safe_open

    texts = [name for name in ("text_encoder", "text_encoder_2") if (checkpoint / name).is_dir()]
    clips = [name for name in texts if "clip" in (checkpoint / name / "config.json").read_text().lower()]
    for component in (denoiser, *clips):
        for path in sorted((checkpoint / component).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    weight = file.get_tensor(name).float()
                    if name.endswith(".weight") and weight.ndim in (2, 4) and "embedding" not in name:
                        yield component, name.removesuffix(".weight"), weight


def _kohya(component: str, module: str, originals: Mapping[str, str]) -> str:
    """originals: of the U-Net's weights, where they are to have the names of their authors."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
    if component == "unet" and originals:
        module = originals[f"{module}.weight"].removesuffix(".weight")
    elif component != "unet" and not module.startswith(("text_model", "text_projection")):
        module = f"text_model.{module}"
    return prefix + module.replace(".", "_")
