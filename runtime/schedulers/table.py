"""The table that a schedule is: one row for each model call, linear in state, model output and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...engines import Array


@dataclass(frozen=True, slots=True)
class Table:
    """S rows over K registers of latents; register 0 is x. All float64.

    Row k:  model_in = input_scale[k] · R[0],  m = guided model output at timesteps[k],
            R' = A[k] · R + b[k] · m + c[k] · noise.
    With a finite `clip`, x0 = x0[k, 0] · R[0] + x0[k, 1] · m is clamped to ±clip and d[k] · x0 is added.

    init_scale: what standard normal noise is multiplied with to become the first x.
    timesteps: (S,); input_scale: (S,); A: (S, K, K); b, c, d: (S, K); x0: (S, 2).
    """

    timesteps: Array
    input_scale: Array
    A: Array
    b: Array
    c: Array
    d: Array
    x0: Array
    init_scale: float = 1.0
    clip: float = np.inf

    @property
    def steps(self) -> int:
        """The number of model calls."""
        return len(self.timesteps)

    @property
    def registers(self) -> int:
        """K, the number of latents that a step keeps."""
        return int(self.A.shape[1])


def empty(timesteps: Array, registers: int, *, init_scale: float = 1.0, clip: float = np.inf) -> Table:
    """A table of zeros (input_scale of ones) for a sampler to fill in."""
    steps, k = len(timesteps), registers
    return Table(
        timesteps=np.asarray(timesteps, np.float64),
        input_scale=np.ones(steps),
        A=np.zeros((steps, k, k)),
        b=np.zeros((steps, k)),
        c=np.zeros((steps, k)),
        d=np.zeros((steps, k)),
        x0=np.zeros((steps, 2)),
        init_scale=init_scale,
        clip=clip,
    )
