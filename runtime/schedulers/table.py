"""The table that a schedule is: one row for each model call, linear in state, model output and noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError


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

    timesteps: (S,), what the model is told. input_scale: (S,). weights: (S, K, K + 3), whose last three columns
    belong to m, noise and x0. x0: (S, 2). draws: (S,), whether noise is drawn at that row, even if its weight is 0.
    levels: (S, 2), the α and σ of x = α · image + σ · noise at each row: what an image is noised to at the first.
    init_scale: what standard normal noise is multiplied with to become the first x of a run without an image.
    """

    timesteps: Array
    input_scale: Array
    weights: Array
    x0: Array
    draws: Array
    levels: Array
    init_scale: float = 1.0
    clip: float = np.inf

    @property
    def steps(self) -> int:
        """The number of model calls."""
        return len(self.timesteps)

    @property
    def registers(self) -> int:
        """K, the number of latents that a step keeps."""
        return int(self.weights.shape[1])

    def until(self, calls: int) -> Table:
        """The first `calls` calls of it."""
        names = ("timesteps", "input_scale", "weights", "x0", "draws", "levels")
        return replace(self, **{name: getattr(self, name)[:calls] for name in names})


class Rows:
    """A table being written, row by row, in terms of unit vectors: each sampler reads like its paper.

    `x` (register 0), `kept` (all registers), `m` and `noise` are vectors over [R, m, noise, x0]; a sampler combines
    them to the next value of each register and calls `set`.
    """

    def __init__(
        self, timesteps: Array, levels: Array, registers: int = 1, *, start: int = 0, clip: float = np.inf
    ) -> None:
        """timesteps: (S,); levels: (S, 2), see `Table`; start: the first row that will be set and kept."""
        rows = len(timesteps)
        unit = np.eye(registers + 3)
        self.kept, self.m, self.noise, self._clipped = unit[:registers], unit[-3], unit[-2], unit[-1]
        self.x = unit[0]
        self.zero = np.zeros(registers + 3)
        self.input_scale = np.ones(rows)
        self._start, self._clip = start, clip
        self._timesteps, self._levels = np.asarray(timesteps, np.float64), np.asarray(levels, np.float64)
        self._weights = np.zeros((rows, registers, registers + 3))
        self._x0 = np.zeros((rows, 2))
        self._draws = np.zeros(rows, bool)

    def predicted(self, k: int, p: float, q: float) -> Array:
        """The x0 that row k predicts, p · x + q · m, clamped where the schedule clips."""
        if not np.isfinite(p):
            raise RequestError("the schedule has pure noise, where predicted noise says nothing: use v_prediction")
        self._x0[k] = p, q
        return np.asarray(p * self.x + q * self.m if np.isinf(self._clip) else self._clipped)

    def set(self, k: int, *registers: Array, draws: bool = False) -> None:
        """Row k turns the registers into `registers`, register 0 first; those not named become zero."""
        for i, vector in enumerate(registers):
            self._weights[k, i] = vector
        self._draws[k] = draws

    def table(self, init_scale: float = 1.0) -> Table:
        """The finished table, from row `start` on."""
        kept = slice(self._start, None)
        return Table(
            timesteps=self._timesteps[kept],
            input_scale=self.input_scale[kept],
            weights=self._weights[kept],
            x0=self._x0[kept],
            draws=self._draws[kept],
            levels=self._levels[kept],
            init_scale=float(init_scale),
            clip=self._clip,
        )
