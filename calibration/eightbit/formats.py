"""The types of eight bits, as QuantizeLinear of ONNX rounds to them: symmetric, with the zero point 0; and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...common.arrays import Array


@dataclass(frozen=True, slots=True)
class Format:
    """A type of eight bits.

    dtype: its name in ONNX. largest: the largest magnitude that weights and activations are scaled to.
    """

    name: str
    dtype: str
    largest: float

    @property
    def has_attention(self) -> bool:
        """Whether GPUs run an attention in it as one kernel: not with whole numbers, which make its scores a tensor."""
        return self.name != "int8"

    @property
    def numpy(self) -> Any:
        """The type in NumPy."""
        import ml_dtypes

        return np.int8 if self.name == "int8" else ml_dtypes.float8_e4m3fn

    def stored(self, array: Array, scale: Array | float) -> Array:
        """`array` over `scale` in this type; what does not fit is clipped."""
        scaled = np.asarray(array, np.float32) / np.asarray(scale, np.float32)
        if self.name == "int8":
            scaled = np.rint(scaled)
            return np.clip(scaled, -self.largest - 1, self.largest).astype(self.numpy)
        return np.clip(scaled, -self.largest, self.largest).astype(self.numpy)

    def rounded(self, array: Array, scale: Array | float) -> Array:
        """What QuantizeLinear and DequantizeLinear make of `array`, float32."""
        return self.stored(array, scale).astype(np.float32) * np.asarray(scale, np.float32)


@dataclass(frozen=True, slots=True)
class Scale:
    """Of a value. loss_db: signal to noise of the outputs of its layers, on calls that did not choose it, if measured.

    factors: float32 (channels,), what the value is multiplied with before it is rounded, and weights are divided by.
    """

    value: str
    scale: float
    method: str
    loss_db: float | None
    factors: Array | None = None

    def key(self) -> list[Any]:
        """What tells it from others, as JSON."""
        return [self.value, self.scale, None if self.factors is None else self.factors.tolist()]


FORMATS = {"int8": Format("int8", "INT8", 127.0), "fp8": Format("fp8", "FLOAT8E4M3FN", 448.0)}
