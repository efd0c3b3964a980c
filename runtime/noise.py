"""Gaussian noise equal to what `torch.randn` draws from a CPU generator, without torch."""

from __future__ import annotations

import math

import numpy as np

from ..engines import Array

_BLOCK = 16


class TorchGenerator:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`.

    MT19937 with Knuth's 32-bit initialisation (Matsumoto & Nishimura 1998), Box–Muller in blocks of 16
    (`normal_fill` of ATen's CPU kernels); fewer than 16 values are drawn one by one in double precision.
    """

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)
        self._cached: float | None = None

    def randn(self, *shape: int) -> Array:
        """Standard normal float32 of `shape`; two calls go on in the same stream, as in torch."""
        count = math.prod(shape)
        values = self._blocks(count) if count >= _BLOCK else self._one_by_one(count)
        return values.reshape(shape)

    def _raw(self, count: int) -> Array:
        return self._state.randint(0, 1 << 32, count, dtype=np.uint32)

    def _uniform(self, count: int) -> Array:
        return (self._raw(count) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _blocks(self, count: int) -> Array:
        data = self._uniform(count)
        whole = count // _BLOCK * _BLOCK
        data[:whole] = _box_muller(data[:whole])
        if whole != count:
            data[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return data

    def _one_by_one(self, count: int) -> Array:
        return np.array([self._next_double() for _ in range(count)], np.float32)

    def _next_double(self) -> float:
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        u1, u2 = (self._uniform53() for _ in range(2))
        radius = math.sqrt(-2.0 * math.log1p(-u2))
        self._cached = radius * math.sin(2.0 * math.pi * u1)
        return radius * math.cos(2.0 * math.pi * u1)

    def _uniform53(self) -> float:
        high, low = (int(value) for value in self._raw(2))
        return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def _box_muller(uniforms: Array) -> Array:
    pairs = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    theta = np.float32(2.0 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
