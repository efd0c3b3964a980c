"""Steps that do not call the model: its output is forecast from those of the calls before.

A guided output drifts slowly along the timesteps, so that a polynomial fitted to the last ones says what the next
would be. As the timesteps are known beforehand, the forecast is a sum of earlier outputs with known weights: more
columns of the table, and registers that keep those outputs. The idea is that of Spectrum (arXiv 2603.01623), with its
Chebyshev polynomials. The setting is one that is nearer to all steps than fewer steps in equal time, with each sampler
and guidance that was tried, see docs/run.md: higher degrees gain more at low guidance and lose all at a high one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .table import Table

LEAST_STEPS = 20
"""With fewer, a forecast gains nothing over making as many steps as it calls the model."""
FORECAST_FROM = 4
"""Outputs that are kept, each in a register."""
_RIDGE = 1e-6
"""What holds coefficients back, so that equations of few outputs can be solved."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which steps call the model: the `first`, then one in `every`, and the last two. degree: of the polynomial."""

    first: int = 3
    every: int = 2
    degree: int = 1

    def calls(self, k: int, steps: int) -> bool:
        """Whether step k of `steps` calls the model."""
        return k < self.first or k >= steps - 2 or (k - self.first + 1) % self.every == 0


OFFERED = Pattern()


def with_forecasts(table: Table, pattern: Pattern = OFFERED) -> Table:
    """`table`, some of whose rows use forecasts in place of model outputs, `Table.calls` says which.

    Raises `RequestError` for one that is too short or clips what it predicts. It must have one row a step.
    """
    if table.steps < LEAST_STEPS:
        raise RequestError(
            f"a forecast needs {LEAST_STEPS} steps or more, found {table.steps}: leave it out, or add steps"
        )
    if table.weights[:, :, -1].any():
        raise RequestError("this scheduler clips what it predicts, which cannot be forecast: leave the forecast out")
    size, kept = table.registers, min(FORECAST_FROM, table.steps)
    weights = np.zeros((table.steps, size + kept, size + kept + 3))
    weights[:, :size, :size], weights[:, :size, size + kept :] = table.weights[:, :, :size], table.weights[:, :, size:]
    history, output = np.arange(size, size + kept), size + kept
    called: list[int] = []
    for k in range(table.steps):
        if pattern.calls(k, table.steps):
            weights[k, size, output] = 1
            weights[k, history[1:], history[:-1]] = 1
            called.insert(0, k)
            continue
        before = called[:kept]
        by = forecast(table.timesteps[before], table.timesteps[k], pattern.degree)
        weights[k, :size, history[: len(before)]] = by[:, None] * weights[k, :size, output]
        weights[k, :size, output] = 0
        weights[k, history, history] = 1
    return replace(table, weights=weights)


def forecast(seen: Array, asked: float, degree: int) -> Array:
    """What outputs at the timesteps `seen` are multiplied with, (n,), to sum up to that at the timestep `asked`."""
    low, high = min(asked, seen.min()), seen.max()

    def basis(timesteps: Array) -> Array:
        return np.polynomial.chebyshev.chebvander(2 * (timesteps - low) / (high - low) - 1, min(degree, len(seen) - 1))

    there = basis(np.asarray(seen, np.float64))
    solved = np.linalg.solve(there.T @ there + _RIDGE * np.eye(there.shape[1]), there.T)
    return np.asarray((basis(np.array([asked], np.float64)) @ solved)[0])
