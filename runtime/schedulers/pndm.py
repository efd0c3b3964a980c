"""PNDM and PLMS."""

from __future__ import annotations

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, alphas_cumprod, predicted_x0, train_steps
from .spacing import alpha_sigma_of, count_of, ddim_timesteps, takes
from .table import Steps, Table, TableBuilder

_RUNGE_KUTTA_STEPS = 3
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Of orders 1 to 4, on even steps, newest first."""


def pndm(config: Config, steps: Steps) -> Table:
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", algorithm 2.

    Three Runge-Kutta steps of four calls each come before the linear multistep ones; with `skip_prk_steps` one step
    of two calls does (PLMS, as latent-diffusion has it). Registers: x, three model outputs before, the x that the
    calls of one step share, and the mean of their outputs so far.

    A run that starts late makes the calls from `start` on, but as the first ones of the method.
    """
    takes(steps)
    config.lacks("rescale_betas_zero_snr")
    skip = bool(config.get("skip_prk_steps", False))
    if not skip and count_of(config, steps) <= _RUNGE_KUTTA_STEPS:
        raise RequestError(f"pndm needs more than {_RUNGE_KUTTA_STEPS} steps, found {steps.count}: use plms")
    transfer = _Transfer(config)
    stride = train_steps(config) // count_of(config, steps)
    grid = ddim_timesteps(config, steps).astype(int)
    calls = _plms_calls(grid) if skip else _pndm_calls(grid, stride // 2)
    calls = calls[steps.start :]
    levels = alpha_sigma_of(transfer.bar[calls])
    rows = TableBuilder(calls, *levels, predicted_x0(config, *levels), 5 if skip else 6)
    x, *past, held = rows.registers[:5]
    for k, call in enumerate(calls):
        rows.predicted(k)
        if not skip and k < 4 * _RUNGE_KUTTA_STEPS:
            stage, s = k % 4, grid[k // 4]
            base, mean = (x, rows.zero) if stage == 0 else (held, rows.registers[5])
            mean = mean + _RUNGE_KUTTA[stage] * rows.m
            end = call if stage % 2 else call - stride // 2
            kept = [rows.m, *past[:2]] if stage == 0 else past
            rows.set(k, transfer(base, rows.m if stage < 3 else mean, s, end), *kept, base, mean)
        elif k == 1:
            mean = (rows.m + past[0]) / 2
            rows.set(k, transfer(held, mean, call + stride, call), *past)
        else:
            known = [rows.m, *past]
            order = 4 if not skip else min(max(k, 1), 4)
            slope = sum(weight * output for weight, output in zip(ADAMS_BASHFORTH[order - 1], known, strict=False))
            rows.set(k, transfer(x, slope, call, call - stride), *known[:3], x)
    return rows.table()


def _plms_calls(grid: Array) -> Array:
    """Every timestep once, the second twice."""
    return np.concatenate([grid[:2], grid[1:]])


def _pndm_calls(grid: Array, half: int) -> Array:
    """Start, twice the middle, and end of three steps, and the timesteps after them."""
    ends = grid[1 : _RUNGE_KUTTA_STEPS + 1]
    stages = np.stack([grid[:_RUNGE_KUTTA_STEPS], ends + half, ends + half, ends], axis=1)
    return np.concatenate([stages.ravel(), grid[_RUNGE_KUTTA_STEPS:]])


class _Transfer:
    """Equation 9: x at timestep t from x and the model output at timestep s."""

    def __init__(self, config: Config) -> None:
        self.bar = alphas_cumprod(config)
        self._final = 1.0 if config.get("set_alpha_to_one", False) else self.bar[0]
        self._velocity = config.one_of("prediction_type", "epsilon", "v_prediction") == "v_prediction"

    def __call__(self, x: Array, m: Array, s: int, t: int) -> Array:
        now, then = self.bar[s], self.bar[t] if t >= 0 else self._final
        noise = np.sqrt(now) * m + np.sqrt(1 - now) * x if self._velocity else m
        scale = now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then)
        return np.asarray(np.sqrt(then / now) * x - (then - now) / scale * noise)
