"""Tensors of a file that `torch.save` wrote, read without torch: nothing in it is run but what builds a tensor."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...common.arrays import Array
from ...common.errors import LoraError, reason

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
_DEEPEST, _MOST_ITEMS = 4, 100_000
_MOST_BYTES = 16 << 30


class _Storage(NamedTuple):
    kind: str


def read_pickle(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors in nested dicts and lists, with dotted names, floats in float32; and the texts, by their keys.

    Raises `LoraError` for a file that holds code, is damaged, or was written by torch before 1.6.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(names) != 1:
                raise LoraError(f"{path} is an archive of another kind: give a LoRA that `torch.save` wrote")
            with archive.open(names[0]) as file:
                content = _Reader(file, archive, names[0].removesuffix("data.pkl")).load()
    except LoraError:
        raise
    except zipfile.BadZipFile:
        raise LoraError(
            f"{path} is truncated, or a pickle of another kind than `torch.save` has written since 1.6: "
            "get it as .safetensors"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        raise LoraError(f"{path} is damaged, or holds code ({reason(error, 120)}): get it as .safetensors") from None
    pairs: Any = content.items() if isinstance(content, dict) else ()
    return _flat(content), {str(key): value for key, value in pairs if isinstance(value, str)}


class _Reader(pickle.Unpickler):
    """Knows the names that tensors are pickled with, and no others."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuilt
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _parameter
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Storage(_STORAGES[name])
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Array:
        what, storage, key, _, count = pid
        if what != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a value that is no tensor")
        info = self._archive.getinfo(f"{self._folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("a tensor that is compressed, as torch stores none")
        if info.file_size > _MOST_BYTES:
            raise pickle.UnpicklingError("a tensor too large for a LoRA")
        content = self._archive.read(info)
        if storage.kind == "bf16":
            wide = np.frombuffer(content, "<u2", count).astype("<u4") << np.uint32(16)
            return wide.view(np.float32)
        return np.frombuffer(content, storage.kind, count)


def _rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Array:
    if not isinstance(storage, np.ndarray):
        raise pickle.UnpicklingError("a tensor of no storage")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min(size, default=1) < 0 or min(stride, default=0) < 0 or offset < 0 or (0 not in size and last >= storage.size):
        raise pickle.UnpicklingError("a tensor outside of its storage")
    if math.prod(size) > storage.size:
        raise pickle.UnpicklingError("a tensor that repeats its storage")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, steps))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _flat(content: Any) -> dict[str, Array]:
    found: dict[str, Array] = {}
    seen = 0

    def walk(value: Any, name: str, depth: int) -> None:
        nonlocal seen
        seen += 1
        if seen > _MOST_ITEMS:
            raise LoraError(f"it holds more than {_MOST_ITEMS} things: it is no LoRA")
        if isinstance(value, np.ndarray):
            found[name] = value.astype(np.float32) if value.dtype.kind == "f" else value
        elif isinstance(value, dict) and depth:
            for key, each in value.items():
                walk(each, f"{name}.{key}" if name else str(key), depth - 1)
        elif isinstance(value, (list, tuple)) and depth:
            for i, each in enumerate(value):
                walk(each, f"{name}.{i}" if name else str(i), depth - 1)

    walk(content, "", _DEEPEST)
    return found
