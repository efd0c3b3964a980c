"""The tensors of a file as NumPy arrays, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.errors import LoraError, reason
from .pickles import read_pickle

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
"""What trainers call the file, in a folder that holds nothing else of weights."""
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LARGEST = 1e12
_POINTER = b"version https://git-lfs"
_MOST_BYTES = 16 << 30
"""Of a file that is read whole; the largest LoRA has less."""


def file_of(path: Path) -> Path:
    """The file that is meant by `path`, which may be the folder around it. Raises `LoraError`."""
    if not path.is_dir():
        return path
    found = [path / name for name in _NAMES if (path / name).is_file()]
    found = found[:1] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        what = "several .safetensors files" if found else f"none of {', '.join(_NAMES)}"
        raise LoraError(f"{path} is a folder with {what}: give the file itself")
    return found[0]


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a file by their names, as they are stored (bfloat16 in float32), and its metadata.

    Raises `LoraError` for a file that is missing, damaged, of another kind, or has numbers that are not finite.
    """
    if not path.is_file():
        raise LoraError(f"{path} is no file: give a LoRA (.safetensors), or the folder that holds it")
    size = path.stat().st_size
    if size == 0:
        raise LoraError(f"{path} is empty (0 bytes): download it again")
    if size > _MOST_BYTES:
        raise LoraError(f"{path} has {size / 1e9:.0f} GB: that is no LoRA; give a checkpoint to `compile` instead")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise LoraError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder")
    tensors, metadata = read_pickle(path) if path.suffix.lower() in _PICKLES else _read_safetensors(path)
    if not tensors:
        raise LoraError(f"{path} holds no tensors: it is no LoRA")
    for name, array in tensors.items():
        if array.dtype.kind != "f":
            continue
        if array.dtype.itemsize > np.dtype(np.float32).itemsize:
            with np.errstate(over="ignore"):
                array = tensors[name] = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise LoraError(f"{path}: {shown(name)} has numbers that are not finite (NaN or infinity): it is damaged")
        if array.size and array.dtype == np.float32 and max(-array.min(), array.max()) > _LARGEST:
            raise LoraError(f"{path}: {shown(name)} has numbers above {_LARGEST:g}: it is damaged")
    return tensors, metadata


def shown(name: str) -> str:
    """The name of a tensor, for messages."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:120])


def _read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        import safetensors
    except ImportError:
        raise LoraError("reading a LoRA needs the package safetensors: run `pip install 'diffoundry[lora]'`") from None
    try:
        content = path.read_bytes()
        if content[:1] in (b"\x80", b"P") and content[8:9] != b"{":
            raise LoraError(f"{path} is a pickle, not safetensors: give it the suffix .pt")
        with safetensors.safe_open(str(path), framework="np"):
            pass  # it looks whether the header is sound, and all tensors lie in the file; what it reads, it copies
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
    except OSError as error:
        raise LoraError(f"{path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise LoraError(f"{path} is truncated or no safetensors file ({reason(error)}): download it again") from None
    return {name: _array(path, name, each, content, start) for name, each in header.items()}, metadata


def _array(path: Path, name: str, stored: dict[str, Any], content: bytes, start: int) -> Array:
    """A tensor as an array: a view of `content`, but of bfloat16, which NumPy has not."""
    kind, shape, (first, last) = stored["dtype"], stored["shape"], stored["data_offsets"]
    dtype = np.dtype("<u2" if kind == "BF16" else _DTYPES.get(kind, "V1"))
    if dtype.kind == "V":
        raise LoraError(f"{path}: {shown(name)} is of the type {kind}, which no LoRA is stored in: save it in float16")
    if first == last:
        raise LoraError(f"{path}: {shown(name)} is empty, of shape {shape}: it is damaged")
    array = np.frombuffer(content, dtype, (last - first) // dtype.itemsize, start + first)
    if kind == "BF16":
        array = (array.astype("<u4") << np.uint32(16)).view(np.float32)
    return array.reshape(shape)
