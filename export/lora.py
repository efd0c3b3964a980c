"""LoRAs fused into a checkpoint: the folders of the components that they change, with their weights changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..calibration.build import check_disk
from ..common.errors import DiffoundryError
from ..common.files import remove, sha256_json
from ..families.lora import Weights, combined
from ..runtime.lora import Lora, open_loras
from .checkpoint import Checkpoint
from .configs import unet_config
from .weight_files import WeightFiles

_FILES = {True: "diffusion_pytorch_model.safetensors", False: "model.safetensors"}
"""Of a denoiser, and of a text encoder."""


def fuse(
    source: Checkpoint, loras: Sequence[Lora], denoiser: str, texts: Sequence[str], folder: Path, *, keep_half: bool
) -> dict[str, Path]:
    """The components that `loras` change, each in a folder of its own in `folder`, made once for each content.

    denoiser, texts: the names of the components. keep_half: store what is changed in the type that it had; in float32
    otherwise, so that nothing of the change is rounded.
    Raises `LoraError` for files that are damaged or for another model, before anything is written.
    """
    stored = {name: source.weights(name) for name in (denoiser, *texts)}
    tensors = {name: files.read() for name, files in stored.items()}  # mapped, where they are safetensors
    layers = unet_config(source).get("layers_per_block")
    weights = Weights(
        {name: {key: tuple(each.shape) for key, each in own.items()} for name, own in tensors.items()},
        denoiser,
        layers if isinstance(layers, int) else 0,
        str(source.root),
    )
    opened = open_loras(loras, weights)
    changes = combined(opened)
    said = [[file.sha256, dict(strengths)] for file, strengths in opened]
    check_disk(folder, 1.0 * sum(stored[name].size for name in changes))
    made = {}
    for name, own in changes.items():
        decided = sha256_json([said, stored[name].sha256(), keep_half])
        made[name] = folder / f"lora-{decided[:16]}-{name}"
        if not made[name].is_dir():
            _write(made[name], stored[name], tensors.pop(name), own, name == denoiser, keep_half)
    return made


def _write(
    target: Path,
    files: WeightFiles,
    tensors: dict[str, Any],
    changes: Mapping[str, Any],
    diffuses: bool,
    keep_half: bool,
) -> None:
    """The folder of a component with its weights changed, whole or not at all."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, change in changes.items():
        weight = tensors[name].float().numpy()
        made = torch.from_numpy(weight + change(weight))
        tensors[name] = made.to(tensors[name].dtype) if keep_half else made
    beside = target.with_name(f"{target.name}.part")
    remove(beside)
    beside.mkdir(parents=True)
    shutil.copyfile(files.folder / "config.json", beside / "config.json")
    whole = {name: tensor.clone() if tensor.is_shared() else tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, beside / _FILES[diffuses], metadata={"format": "pt"})
    except SafetensorError as error:
        remove(beside)
        raise DiffoundryError(f"{target} cannot be written ({error}): free some disk space and try again") from None
    beside.replace(target)
