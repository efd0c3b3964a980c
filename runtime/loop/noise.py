"""Gaussian noise equal to what `torch.randn` draws from a CPU or CUDA generator, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ...common.arrays import Array

_BLOCK = 16
_CUDA_BLOCK = 256
_H100_THREADS = 132 * 2048
_PHILOX_ROUNDS = 10
_PHILOX_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_HALF = np.uint64(32)


class TorchGenerator:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`.

    MT19937 with Knuth's 32-bit initialisation (Matsumoto & Nishimura 1998), Box–Muller in blocks of 16
    (`normal_fill` of ATen's CPU kernels); fewer than 16 values are drawn one by one in double precision.
    """

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)
        self._left: list[float] = []

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
        values = self._left
        while len(values) < count:
            u1, u2 = (self._uniform53() for _ in range(2))
            radius, angle = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
            values = [*values, radius * math.cos(angle), radius * math.sin(angle)]
        self._left = values[count:]
        return np.array(values[:count], np.float32)

    def _uniform53(self) -> float:
        high, low = (int(value) for value in self._raw(2))
        return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def _box_muller(uniforms: Array) -> Array:
    pairs = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    theta = np.float32(2.0 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)


class PhiloxGenerator:
    """The stream of `torch.Generator("cuda").manual_seed(seed)`, but for the last bits: a GPU approximates the sine.

    Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), laid out as cuRAND and ATen's
    `DistributionTemplates.h` do: the seed is the key, words 0 and 1 of the counter count the calls, words 2 and 3 hold
    the thread. A call gives a thread four values by Box–Muller: n threads fill elements 0 … n − 1 with their first,
    the next n with their second, and after 4 n they call again.

    threads: how many the GPU holds at once, its multiprocessors times the threads of each; torch starts no more.
    Up to that length (RTX 3060: 43008, RTX 4090: 196608, A100: 221184, H100: 270336, the default) every element is the
    first value of a thread of its own, so all GPUs that hold as many agree; beyond it each size of GPU has its own
    noise.
    """

    def __init__(self, seed: int, threads: int = _H100_THREADS) -> None:
        """threads: a multiple of 256, the blocks that torch starts them in."""
        self._key = seed & _WORD, seed >> 32 & _WORD
        self._threads = threads
        self._calls = 0

    def randn(self, *shape: int) -> Array:
        """Standard normal float32 of `shape`; two calls go on in the same stream, as in torch."""
        count = math.prod(shape)
        threads = min(-(-count // _CUDA_BLOCK) * _CUDA_BLOCK, self._threads)
        values = np.empty(count, np.float32)
        for start in range(0, count, 4 * max(threads, 1)):
            part = values[start : start + 4 * threads]
            words = self._call(min(threads, len(part)))
            for lane in range(-(-len(part) // threads)):
                own = part[lane * threads : (lane + 1) * threads]
                own[...] = _curand_normal(words, lane)[: len(own)]
        return values.reshape(shape)

    def _call(self, threads: int) -> tuple[Array, ...]:
        counter = self._calls & _WORD, self._calls >> 32, np.arange(threads), 0
        self._calls += 1
        return philox4x32(counter, self._key)


def philox4x32(counter: tuple[Array | int, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Philox4x32-10: four random words, uint64 arrays of values below 2³², for each counter of four such words."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    for i in range(_PHILOX_ROUNDS):
        k0, k1 = (np.uint64(word + i * step & _WORD) for word, step in zip(key, _PHILOX_STEPS, strict=True))
        first, second = c0 * _PHILOX_FACTORS[0], c2 * _PHILOX_FACTORS[1]
        c0, c1 = second >> _HALF ^ c1 ^ k0, second & np.uint64(_WORD)
        c2, c3 = first >> _HALF ^ c3 ^ k1, first & np.uint64(_WORD)
    return c0, c1, c2, c3


def _curand_normal(words: tuple[Array, ...], lane: int) -> Array:
    """Value `lane` of the four of `curand_normal4`: the first word of each pair is the radius, the second the angle."""
    pair = lane // 2 * 2
    uniform = (words[pair].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    turn = float(np.float32(2.0 * math.pi)) * 2.0**-32
    # a GPU computes the angle by one fused multiply-add, which float64 is wide enough to equal
    theta = ((words[pair + 1].astype(np.float32).astype(np.float64) + 0.5) * turn).astype(np.float32)
    wave = np.cos(theta) if lane % 2 else np.sin(theta)
    return np.asarray(np.sqrt(np.float32(-2.0) * np.log(uniform)) * wave)


Generator = TorchGenerator | PhiloxGenerator
"""A stream of standard normal noise."""
GENERATORS: dict[str, Callable[[int], Generator]] = {"cpu": TorchGenerator, "cuda": PhiloxGenerator}
"""From a seed to its noise, by the device of the torch generator that is meant."""
