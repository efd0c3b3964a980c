"""The one step function that every sampler shares, over a batch whose rows go their own ways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bundle import Tensor
from ..common.arrays import Array
from .schedulers import Table

STEP_NAME = "step"
"""The component that is this step as a graph, for engines whose latents stay on the device."""
_LATENTS = ("channels", "height", "width")
STEP_INPUTS = (
    Tensor("model_output", "float32", ("calls", *_LATENTS)),
    Tensor("registers", "float32", ("batch", "registers", *_LATENTS)),
    Tensor("noise", "float32", ("batch", *_LATENTS)),
    Tensor("position", "int64", ("batch",)),
    Tensor("prompt_row", "int64", ("batch",)),
    Tensor("negative_row", "int64", ("batch",)),
    Tensor("source", "int64", ("calls",)),
    Tensor("guidance", "float32", ("batch",)),
    Tensor("rescale", "float32", ("batch",)),
    Tensor("clip", "float32", ("batch",)),
    Tensor("weights", "float32", ("batch", "steps", "registers", "terms")),
    Tensor("x0", "float32", ("batch", "steps", 2)),
    Tensor("input_scale", "float32", ("batch", "steps_and_end")),
    Tensor("timesteps", "float32", ("batch", "steps_and_end")),
)
STEP_OUTPUTS = (
    Tensor("next_registers", "float32", ("batch", "registers", *_LATENTS)),
    Tensor("sample", "float32", ("calls", *_LATENTS)),
    Tensor("timestep", "float32", ("calls",)),
    Tensor("next_position", "int64", ("batch",)),
)


class State:
    """The latents of a batch. Each row follows its own table and stands at its own step of it.

    `stack` is float32 (N, K + 3, C·H·W): the registers of each row, then the guided model output, the noise and the
    predicted x0. A step is R' = weights · stack, one small matrix product a row (see `Table`).
    Tables with fewer registers than the largest are padded with zeros, which change no value.
    """

    def __init__(self, tables: Sequence[Table], latents: Array) -> None:
        """tables: one for each row. latents: float32 (N, C, H, W), what each row starts from, already scaled."""
        self._shape = latents.shape[1:]
        self._size = max(table.registers for table in tables)
        self._padded = {id(table): _padded(table, self._size) for table in tables}
        self._tables = list(tables)
        self._positions = [0] * len(tables)
        self._stack = np.zeros((len(tables), self._size + 3, latents[0].size), np.float32)
        self._stack[:, 0] = latents.reshape(len(latents), -1)
        self._next = np.empty((len(tables), self._size, latents[0].size), np.float32)

    @property
    def x(self) -> Array:
        """The latents now, (N, C, H, W); the next step overwrites them."""
        return self._stack[:, 0].reshape(-1, *self._shape)

    @property
    def registers(self) -> Array:
        """All registers of each row, (N, K, C, H, W)."""
        return self._stack[:, : self._size].reshape(-1, self._size, *self._shape)

    @property
    def positions(self) -> tuple[int, ...]:
        """The step that each row is about to make."""
        return tuple(self._positions)

    @property
    def timesteps(self) -> Array:
        """What the model is told, float64 (N,)."""
        return np.array([table.timesteps[k] for table, k in self._rows()])

    @property
    def draws(self) -> list[bool]:
        """Whether each row draws noise in this step."""
        return [bool(table.draws[k]) for table, k in self._rows()]

    def model_input(self) -> Array:
        """The scaled latents, (N, C, H, W)."""
        scale = np.array([table.input_scale[k] for table, k in self._rows()], np.float32)
        return self.x * scale[:, None, None, None]

    def advance(self, output: Array, noise: Sequence[Array | None]) -> None:
        """Make the step. output: the guided model output, (N, C, H, W). noise: (1, C, H, W) for each row that draws."""
        stack, size = self._stack, self._size
        stack[:, size] = output.reshape(len(stack), -1)
        for row, drawn in zip(stack, noise, strict=True):
            if drawn is not None:
                row[size + 1] = drawn.reshape(-1)
        for row, (table, k) in zip(stack, self._rows(), strict=True):
            if np.isfinite(table.clip):
                p, q = table.x0[k].astype(np.float32)
                np.clip(p * row[0] + q * row[size], -table.clip, table.clip, out=row[size + 2])
        np.matmul(self._weights(), stack, out=self._next)
        stack[:, :size] = self._next
        self._positions = [k + 1 for k in self._positions]

    def jump(self, registers: Array, steps: int) -> None:
        """Take over (N, K, C, H, W) registers of which `steps` steps were made elsewhere."""
        self._stack[:, : self._size] = registers.reshape(len(registers), self._size, -1)
        self._positions = [k + steps for k in self._positions]

    def finished(self) -> list[bool]:
        """Whether each row has made all its steps."""
        return [k >= table.steps for table, k in self._rows()]

    def columns(self) -> dict[str, Array]:
        """The tables as arrays for the `step` graph: one row for each row of the batch, padded to the longest."""
        steps = max(table.steps for table in self._tables)
        count, size = len(self._tables), self._size
        arrays = {
            "weights": np.zeros((count, steps, size, size + 3), np.float32),
            "x0": np.zeros((count, steps, 2), np.float32),
            "input_scale": np.ones((count, steps + 1), np.float32),
            "timesteps": np.zeros((count, steps + 1), np.float32),
            "clip": np.array([table.clip for table in self._tables], np.float32),
        }
        for row, table in enumerate(self._tables):
            own = slice(0, table.steps)
            arrays["weights"][row, own] = self._padded[id(table)]
            for name in ("x0", "input_scale", "timesteps"):
                arrays[name][row, own] = getattr(table, name)
        return arrays

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._tables = [self._tables[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self._stack = self._stack[list(rows)]
        self._next = np.empty((len(rows), *self._next.shape[1:]), np.float32)

    def _rows(self) -> list[tuple[Table, int]]:
        return list(zip(self._tables, self._positions, strict=True))

    def _weights(self) -> Array:
        """(N, K, K + 3), or (1, K, K + 3) when all rows make the same step."""
        table, k = self._tables[0], self._positions[0]
        if all(other is table for other in self._tables) and set(self._positions) == {k}:
            return self._padded[id(table)][k : k + 1]
        return np.stack([self._padded[id(table)][k] for table, k in self._rows()])


def _padded(table: Table, size: int) -> Array:
    """The weights in float32, with room for `size` registers."""
    own = table.registers
    weights = np.zeros((table.steps, size, size + 3), np.float32)
    weights[:, :own, :own] = table.weights[:, :, :own]
    weights[:, :own, size:] = table.weights[:, :, own:]
    return weights
