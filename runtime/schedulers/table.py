"""The table that a schedule is: one row for each step, linear in state, model output and noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError

ARRAYS = ("timesteps", "input_scale", "weights", "x0", "draws", "alpha_sigma")
"""The fields of a table that have an entry for each call."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Which steps are asked for.

    count: steps of the whole schedule. start: the first one to make, as image-to-image does (0 makes all).
    timesteps, sigmas: the schedule itself in place of the sampler's own; count is then theirs.
    strength: the part of the schedule that a consistency model's steps are spread over, from its noisy end down.
    mu: the shift of a flow-matching schedule with dynamic shifting.
    """

    count: int
    start: int = 0
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    mu: float | None = None
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """S rows over K registers of latents; register 0 is x. All float64.

    Row k:  model_in = input_scale[k] · R[0],  m = guided model output at timesteps[k],
            R' = weights[k] · [R, m, noise, x0],  x0 = x0[k, 0] · R[0] + x0[k, 1] · m clamped to ±clip.

    timesteps: (S,), what the model is given. input_scale: (S,). weights: (S, K, K + 3), whose last three columns
    belong to m, noise and x0. x0: (S, 2). draws: (S,), whether noise is drawn at that row, even if its weight is 0.
    alpha_sigma: (S, 2), the α and σ of x = α · image + σ · noise at each row: what an image is noised to at the first.
    init_scale: what standard normal noise is multiplied with to become the first x of a run without an image.
    """

    timesteps: Array
    input_scale: Array
    weights: Array
    x0: Array
    draws: Array
    alpha_sigma: Array
    init_scale: float = 1.0
    clip: float = np.inf

    @property
    def steps(self) -> int:
        """The number of rows."""
        return len(self.timesteps)

    @property
    def calls(self) -> Array:
        """(S,), whether a row reads the model's output, so that the model is called."""
        clipped = self.weights[:, :, -1].any(axis=1) & (self.x0[:, 1] != 0)
        return np.asarray(self.weights[:, :, -3].any(axis=1) | clipped)

    @property
    def registers(self) -> int:
        """K, the number of latents that a step keeps."""
        return int(self.weights.shape[1])

    def until(self, calls: int) -> Table:
        """The first `calls` calls of it."""
        return self.part(slice(calls))

    def part(self, calls: slice) -> Table:
        """Some calls of it."""
        return replace(self, **{name: getattr(self, name)[calls] for name in ARRAYS})


class TableBuilder:
    """A table being written, row by row, in terms of unit vectors: each sampler reads like its paper.

    `x` (register 0), `registers` (all of them), `m` and `noise` are vectors over [R, m, noise, x0]; a sampler combines
    them to the next value of each register and calls `set`. calls: the rows to set.
    """

    def __init__(
        self,
        timesteps: Array,
        alpha: Array | float,
        sigma: Array,
        x0: tuple[Array, Array] | None = None,
        registers: int = 1,
        *,
        start: int = 0,
        clip: float = np.inf,
        input_scale: Array | float = 1.0,
    ) -> None:
        """timesteps, alpha, sigma: (S,), see `Table`; x0: p and q of x0 = p · x + q · m, (S,) each, where it is used.

        start: the first row that will be set.
        """
        rows, unit = len(timesteps), np.eye(registers + 3)
        self.registers, self.m, self.noise, self._clipped = unit[:registers], unit[-3], unit[-2], unit[-1]
        self.x, self.zero = unit[0], np.zeros(registers + 3)
        self.calls = range(start, rows)
        self._x0 = np.zeros((rows, 2)) if x0 is None else np.stack(x0, 1)
        self._table = Table(
            timesteps=np.asarray(timesteps, np.float64),
            input_scale=np.ones(rows) * input_scale,
            weights=np.zeros((rows, registers, registers + 3)),
            x0=self._x0,
            draws=np.zeros(rows, bool),
            alpha_sigma=np.stack(np.broadcast_arrays(alpha, sigma), 1),
            clip=clip,
        )

    def predicted(self, k: int) -> Array:
        """The x0 that row k predicts, clamped where the schedule clips."""
        p, q = self._x0[k]
        if not np.isfinite(p):
            raise RequestError("the schedule has pure noise, where predicted noise says nothing: use v_prediction")
        return np.asarray(p * self.x + q * self.m if np.isinf(self._table.clip) else self._clipped)

    def to_d(self, k: int, sigma: float) -> Array:
        """The slope dx/dσ at row k, where x = image + σ · noise."""
        return np.asarray((self.x - self.predicted(k)) / sigma)

    def set(self, k: int, *registers: Array, draws: bool = False) -> None:
        """Row k turns the registers into `registers`, register 0 first; those not named become zero."""
        self._table.weights[k, : len(registers)] = registers
        self._table.draws[k] = draws

    def table(self, init_scale: float = 1.0) -> Table:
        """The finished table, from row `start` on."""
        return replace(self._table.part(slice(self.calls.start, None)), init_scale=float(init_scale))
