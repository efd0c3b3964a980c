"""The initializers of an ONNX model, read off its file without the onnx package: their types, shapes and places.

A model is a message of Protocol Buffers; what is read of it is `ModelProto.graph.initializer` (fields 7 and 5), in
which each tensor has its dims (1), data_type (2), name (8) and either raw_data (9) or external_data (13).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.arrays import Array
from ..common.errors import EngineError
from ..common.files import inside

_GRAPH, _INITIALIZER = 7, 5
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}
_BFLOAT16 = 16
_Data = mmap.mmap | bytes


@dataclass(frozen=True, slots=True)
class Initializer:
    """Where the value of an initializer lies. dtype: as ONNX numbers it. embedded: whether in the model itself."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int
    embedded: bool

    @property
    def is_float(self) -> bool:
        """Whether it is of a type that a change can be computed for."""
        return self.dtype in (1, 10, 11, _BFLOAT16)

    def read(self) -> Array:
        """Its value, in float32 where it has 16 bits; mapped where it can be."""
        if self.dtype == _BFLOAT16:
            wide = np.array(self._mapped(np.dtype("<u2")), np.uint32) << np.uint32(16)
            return wide.view(np.float32)
        if self.dtype not in _DTYPES:
            raise EngineError(f"{self.path}: {self.name} is of the ONNX type {self.dtype}, which is not read here")
        found = self._mapped(np.dtype(_DTYPES[self.dtype]))
        return found.astype(np.float32) if self.dtype == 10 else found

    def stored(self, value: Array) -> Array:
        """`value` in the type that the initializer has, contiguous; bfloat16 as 16-bit whole numbers."""
        if self.dtype == _BFLOAT16:
            bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
        return np.ascontiguousarray(value, _DTYPES[self.dtype])

    def _mapped(self, dtype: np.dtype[Any]) -> Array:
        count = int(np.prod(self.shape, dtype=np.int64))
        if count * dtype.itemsize != self.length or self.offset + self.length > self.path.stat().st_size:
            raise EngineError(f"{self.path}: {self.name} has {self.length} bytes in a shape of {self.shape}")
        if not count:
            return np.zeros(self.shape, dtype)
        return np.memmap(self.path, dtype, "r", self.offset, self.shape)


def read_initializers(model: Path) -> dict[str, Initializer]:
    """The initializers of the graph in `model` that have their values as raw bytes, by their names.

    Raises `EngineError` for a file that is no ONNX model.
    """
    found = {}
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for number, _, start, end in _fields(data, 0, len(data)):
                if number != _GRAPH:
                    continue
                for inner, _, first, last in _fields(data, start, end):
                    if inner == _INITIALIZER:
                        each = _initializer(data, first, last, model)
                        if each is not None:
                            found[each.name] = each
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise EngineError(f"{model} cannot be read ({error}): compile the bundle again") from None
    return found


def with_values(model: Path, values: Mapping[str, tuple[int, Array]], content: bytes | None = None) -> bytes:
    """The model in `model` with other values of initializers, each with the type as ONNX numbers it, in the model.

    content: a model in memory in place of that in the file, beside which its weights lie.
    """
    if content is not None:
        return _with_values(content, values, model)
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _with_values(data, values, model)


def _with_values(data: _Data, values: Mapping[str, tuple[int, Array]], model: Path) -> bytes:
    content = bytearray()
    for start, end, number, inner in _pieces(data, 0, len(data)):
        if number != _GRAPH:
            content += data[start:end]
            continue
        graph = bytearray()
        for first, last, kind, body in _pieces(data, *inner):
            found = _initializer(data, *body, model) if kind == _INITIALIZER else None
            if found is None or found.name not in values:
                graph += data[first:last]
            else:
                graph += _message(_INITIALIZER, _tensor(found.name, *values[found.name]))
        content += _message(_GRAPH, bytes(graph))
    return bytes(content)


def _pieces(data: _Data, start: int, end: int) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """Each field of a message: where it begins and ends, its number, and where its body does."""
    at = start
    for number, kind, first, last in _fields(data, start, end):
        yield at, last, number, (first, last) if kind == _BYTES else (at, at)
        at = last


def _tensor(name: str, dtype: int, value: Array) -> bytes:
    dims = b"".join(_number(_DIMS, size) for size in value.shape)
    return dims + _number(_TYPE, dtype) + _message(_NAME, name.encode()) + _message(_RAW, value.tobytes())


def _message(number: int, body: bytes) -> bytes:
    return _as_varint(number << 3 | _BYTES) + _as_varint(len(body)) + body


def _number(number: int, value: int) -> bytes:
    return _as_varint(number << 3) + _as_varint(value)


def _as_varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def _initializer(data: _Data, start: int, end: int, model: Path) -> Initializer | None:
    dims: list[int] = []
    dtype, name, raw, external = 0, "", None, {}
    for number, kind, first, last in _fields(data, start, end):
        if number == _DIMS and kind == _VARINT:
            dims.append(first)
        elif number == _DIMS and kind == _BYTES:
            dims += _packed(data, first, last)
        elif number == _TYPE:
            dtype = first
        elif number == _NAME:
            name = data[first:last].decode()
        elif number == _RAW:
            raw = first, last - first
        elif number == _EXTERNAL:
            entry = {n: data[a:b].decode() for n, _, a, b in _fields(data, first, last)}
            external[entry[1]] = entry.get(2, "")
    if external:
        path = inside(model.parent, external["location"])
        size = int(external.get("length") or path.stat().st_size)
        return Initializer(name, dtype, tuple(dims), path, int(external.get("offset") or 0), size, False)
    return None if raw is None else Initializer(name, dtype, tuple(dims), model, *raw, True)


def _fields(data: _Data, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of a message: its number, its kind, and where its bytes begin and end; of a number first its value."""
    while start < end:
        tag, start = _varint(data, start)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, start = _varint(data, start)
            yield number, kind, value, start
        elif kind == _BYTES:
            size, start = _varint(data, start)
            if start + size > end:
                raise ValueError("it is truncated")
            yield number, kind, start, start + size
            start += size
        elif kind in (_FIXED64, _FIXED32):
            start += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("it is no ONNX model")


def _varint(data: _Data, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("it is no ONNX model")


def _packed(data: _Data, at: int, end: int) -> list[int]:
    numbers = []
    while at < end:
        value, at = _varint(data, at)
        numbers.append(value)
    return numbers
