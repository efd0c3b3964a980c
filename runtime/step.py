"""The one step function that every sampler shares."""

from __future__ import annotations

import numpy as np

from ..engines import Array
from .schedulers import Table


def step(table: Table, k: int, registers: Array, model_output: Array, noise: Array | None) -> Array:
    """Row k of `table`: R' = A·R + b·m + c·noise, plus d · clip(x0) where the schedule clips.

    registers: float32 (K, N, C, H, W), R[0] is x. model_output: float32 (N, C, H, W), after guidance.
    noise: float32 (N, C, H, W), or None when c[k] is zero. Returns the new registers; the arguments are not changed.
    """
    result = np.empty_like(registers)
    terms: list[tuple[Array, Array]] = [(table.b[k], model_output)]
    if noise is not None:
        terms.append((table.c[k], noise))
    if np.isfinite(table.clip):
        p, q = table.x0[k].astype(np.float32)
        terms.append((table.d[k], np.clip(p * registers[0] + q * model_output, -table.clip, table.clip)))
    for i in range(table.registers):
        _combine(result[i], [(table.A[k, i, j], registers[j]) for j in range(table.registers)])
        for weights, value in terms:
            if weights[i]:
                result[i] += np.float32(weights[i]) * value
    return result


def _combine(out: Array, terms: list[tuple[float, Array]]) -> None:
    used = [(np.float32(weight), value) for weight, value in terms if weight]
    if not used:
        out[...] = 0
        return
    np.multiply(used[0][1], used[0][0], out=out)
    for weight, value in used[1:]:
        out += weight * value
