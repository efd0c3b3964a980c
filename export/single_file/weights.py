"""The tensors of a single-file checkpoint: shapes and types at once, the values when asked for."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle import CheckpointError
from ..checkpoint import check_safetensors

PICKLES = (".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES)
_DEEPEST = 4
"""Wrappers around the weights of a pickle; one that holds itself has no end."""
_ZIP, _PICKLE = b"PK", b"\x80"
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


def open_weights(path: Path) -> Weights:
    """Open a `.safetensors` file or a pickle. Raises `CheckpointError` when it is damaged or holds code."""
    try:
        return _open_pickle(path) if path.suffix.lower() in PICKLES else _open_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _open_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {_canonical(name): name for name in file.keys()}  # noqa: SIM118 (it is no dict)
            slices = {name: file.get_slice(old) for name, old in stored.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
            metadata = file.metadata() or {}
            whole = dtypes.get("global_step", "").startswith("I") and shapes["global_step"] in ((), (1,))
            step = int(file.get_tensor(stored["global_step"]).item()) if whole else None
    except SafetensorError as error:
        raise CheckpointError(f"{path} has a damaged header ({error}): download it again") from None

    def read(names: Iterable[str]) -> dict[str, Any]:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(stored[name]) for name in names}

    return Weights(path, shapes, dtypes, metadata, step, read)


def _open_pickle(path: Path) -> Weights:
    import torch

    content = _unpickled(path)
    step = content.get("global_step")
    for _ in range(_DEEPEST):
        if not isinstance(content.get("state_dict"), Mapping):
            break
        content = content["state_dict"]
        step = content.get("global_step", step)
    tensors = {
        _canonical(name): value.detach()
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided
    }
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

    def read(wanted: Iterable[str]) -> dict[str, Any]:
        # Copies, because a pickle may hold views of one storage, which safetensors refuses to write.
        return {name: tensors[name].clone() for name in wanted}

    return Weights(
        path,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: names.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()},
        {},
        int(step) if isinstance(step, int) else None,
        read,
    )


def _unpickled(path: Path) -> Mapping[str, Any]:
    import torch

    with path.open("rb") as file:
        start = file.read(2)
    damaged = f"{path} is truncated or no checkpoint ({path.stat().st_size} bytes): download it again"
    if not start.startswith((_ZIP, _PICKLE)):
        raise CheckpointError(damaged)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch has a kind for each way of being damaged
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise CheckpointError(
                f"{path} holds code, not only weights{f' ({found[1]})' if found else ''}: "
                "convert it to .safetensors where you trust it"
            ) from None
        raise CheckpointError(damaged) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__}, not weights by name: it is no checkpoint")
    return content


def _canonical(name: str) -> str:
    """Merges of old checkpoints left out `text_model.`, as the first release of transformers' CLIP did."""
    return _BARE_CLIP.sub(r"\1text_model.\2.", name)
