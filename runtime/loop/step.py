"""The one step function that every sampler shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ..schedulers import Table

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
    """The latents of one row on their way through a table. position: the step to be made next.

    `stack` is float32 (K + 3, …): the registers, then the guided model output, the noise and the predicted x0. A step
    is R' = weights · stack (see `Table`), one small matrix product of this row alone: no bit of it depends on the rows
    beside it, as the kernel that a BLAS picks for a size might make it.
    """

    def __init__(self, table: Table, latents: Array) -> None:
        """latents: float32, of any axes; what the row starts from, already scaled."""
        self.table, self.position = table, 0
        self._weights, self._scales = table.weights.astype(np.float32), table.input_scale.astype(np.float32)
        self._clips, self._calls = bool(np.isfinite(table.clip)), table.calls.tolist()
        self._stack = np.zeros((table.registers + 3, *latents.shape), np.float32)
        self._stack[0] = latents
        self._flat = self._stack.reshape(len(self._stack), -1)

    @property
    def registers(self) -> Array:
        """The latents that a step keeps, (K, …); R[0] is x. Write to them to take over steps made elsewhere."""
        return self._stack[: self.table.registers]

    @property
    def x(self) -> Array:
        """The latents now; the next step overwrites them."""
        latents: Array = self._stack[0]
        return latents

    @property
    def remaining(self) -> int:
        """The steps that are left."""
        return self.table.steps - self.position

    @property
    def timestep(self) -> float:
        """The timestep of the next model call."""
        return float(self.table.timesteps[self.position])

    def draws(self, ahead: int = 0) -> bool:
        """Whether the step that is `ahead` steps from the next one draws noise."""
        return bool(self.table.draws[self.position + ahead])

    def calls(self, ahead: int = 0) -> bool:
        """Whether the step that is `ahead` steps from the next one calls the model."""
        return bool(self._calls[self.position + ahead])

    def model_input(self, out: Array | None = None) -> Array:
        """The scaled latents, written into `out` where it is given."""
        scaled: Array = np.multiply(self._stack[0], self._scales[self.position], out=out)
        return scaled

    def advance(self, output: Array | None, noise: Array | None = None) -> None:
        """Make the step. output: the guided model output, where the step calls the model. noise: standard normal, where
        it draws. Both as x.
        """
        table, k, stack, size = self.table, self.position, self._stack, self.table.registers
        if output is not None:
            stack[size] = output
        if noise is not None:
            stack[size + 1] = noise
        if self._clips:
            p, q = table.x0[k].astype(np.float32)
            np.clip(p * stack[0] + q * stack[size], -table.clip, table.clip, out=stack[size + 2])
        self._flat[:size] = self._weights[k] @ self._flat
        self.position += 1


def step_inputs(states: Sequence[State]) -> dict[str, Array]:
    """The states and their tables as inputs of the `step` graph, padded to the most registers and steps.

    Zeros that pad the registers and the weights change no value.
    """
    count, steps = len(states), max(state.table.steps for state in states)
    size = max(state.table.registers for state in states)
    arrays = {
        "registers": np.zeros((count, size, *states[0].x.shape), np.float32),
        "position": np.array([state.position for state in states], np.int64),
        "weights": np.zeros((count, steps, size, size + 3), np.float32),
        "x0": np.zeros((count, steps, 2), np.float32),
        "input_scale": np.ones((count, steps + 1), np.float32),
        "timesteps": np.zeros((count, steps + 1), np.float32),
        "clip": np.array([state.table.clip for state in states], np.float32),
    }
    for row, state in enumerate(states):
        table, own = state.table, state.table.registers
        arrays["registers"][row, :own] = state.registers
        arrays["weights"][row, : table.steps, :own, :own] = table.weights[:, :, :own]
        arrays["weights"][row, : table.steps, :own, size:] = table.weights[:, :, own:]
        for name in ("x0", "input_scale", "timesteps"):
            arrays[name][row, : table.steps] = getattr(table, name)
    return arrays
