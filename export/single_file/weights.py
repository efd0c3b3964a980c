"""The tensors of a single-file checkpoint: shapes and types at once, the values when asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError
from ..weight_files import open_safetensors, read_pickle, type_name, unwrapped

PICKLES = (".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", ".sft", *PICKLES)
_DEEPEST = 4
"""Wrappers around the weights of a pickle; one that holds itself has no end."""
_BARE_CLIP = re.compile(r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.")


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of `path` by name. dtypes are spelt as safetensors spells them (F16, BF16, F32 …).

    metadata: what the header says of the file as a whole. global_step: of the training, where the file says so.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]
    global_step: int | None
    read: Callable[[Iterable[str]], dict[str, Any]]
    """The tensors of these names, in memory only while the caller holds them where the file can be mapped."""

    def has(self, prefix: str) -> bool:
        """Whether a name begins with `prefix`."""
        return any(name.startswith(prefix) for name in self.shapes)


def open_weights(path: Path) -> Weights:
    """Open a safetensors file or a pickle. Raises `CheckpointError` when it is damaged or holds code."""
    try:
        return _open_pickle(path) if path.suffix.lower() in PICKLES else _open_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _open_safetensors(path: Path) -> Weights:
    with open_safetensors(path) as file:
        stored = _canonical(path, file.keys())
        held = {name: file.get_slice(old) for name, old in stored.items()}
        shapes = {name: tuple(each.get_shape()) for name, each in held.items()}
        dtypes = {name: each.get_dtype() for name, each in held.items()}
        whole = dtypes.get("global_step", "").startswith("I") and shapes["global_step"] in ((), (1,))
        step = int(file.get_tensor(stored["global_step"]).item()) if whole else None
        metadata = file.metadata() or {}

    def read(names: Iterable[str]) -> dict[str, Any]:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(stored[name]) for name in names}

    return Weights(path, shapes, dtypes, metadata, step, read)


def _open_pickle(path: Path) -> Weights:
    import torch

    content = read_pickle(path)
    step = content.get("global_step")
    for _ in range(_DEEPEST):
        if not isinstance(content.get("state_dict"), Mapping):
            break
        content = content["state_dict"]
        step = content.get("global_step", step)
    held = {
        name: value.detach()
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided
    }
    tensors = {name: held[old] for name, old in _canonical(path, held).items()}

    def read(wanted: Iterable[str]) -> dict[str, Any]:
        # Copies, because a pickle may hold views of one storage, which safetensors refuses to write.
        return {name: tensors[name].clone() for name in wanted}

    return Weights(
        path,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: type_name(tensor) for name, tensor in tensors.items()},
        {},
        int(step) if isinstance(step, int) else None,
        read,
    )


def _canonical(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The stored name by the one of the original layout.

    Merges of old checkpoints left out `text_model.`, as the first release of transformers' CLIP did.
    """
    return {_BARE_CLIP.sub(r"\1text_model.\2.", name): stored for stored, name in unwrapped(path, names).items()}
