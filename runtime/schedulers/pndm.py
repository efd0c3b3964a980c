"""PNDM, PLMS and iPNDM."""

from __future__ import annotations

from functools import partial

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, alphas_cumprod, linspace32, predictions, train_steps
from .spacing import alpha_sigma_of, as_float32, count_of, ddim_timesteps, takes
from .table import Steps, Table, TableBuilder

_RUNGE_KUTTA_STEPS = 3
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Of orders 1 to 4, on even steps, newest first."""
_SMALLEST_ALPHA = 1e-8


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
    bar = alphas_cumprod(config)
    final = 1.0 if config.get("set_alpha_to_one", False) else bar[0]
    velocity = config.one_of("prediction_type", "epsilon", "v_prediction") == "v_prediction"
    transfer = partial(_transfer, np.append(bar, final), velocity)
    stride = train_steps(config) // count_of(config, steps)
    grid = ddim_timesteps(config, steps).astype(int)
    # PLMS calls the model at every timestep once, at the second twice
    calls = np.concatenate([grid[:2], grid[1:]]) if skip else _pndm_calls(grid, stride // 2)
    calls = calls[steps.start :]
    levels = alpha_sigma_of(bar[calls])
    x0, _ = predictions(config, *levels)
    rows = TableBuilder(calls, *levels, x0, 5 if skip else 6)
    x, *past, held = rows.registers[:5]
    for k, call in enumerate(calls):
        rows.predicted(k)
        if not skip and k < 4 * _RUNGE_KUTTA_STEPS:
            stage, s = k % 4, grid[k // 4]
            base, mean = (x, rows.zero) if stage == 0 else (held, rows.registers[5])
            mean = mean + _RUNGE_KUTTA[stage] * rows.m
            end = call if stage % 2 else call - stride // 2
            outputs = [rows.m, *past[:2]] if stage == 0 else past
            rows.set(k, transfer(base, rows.m if stage < 3 else mean, s, end), *outputs, base, mean)
        elif k == 1:
            mean = (rows.m + past[0]) / 2
            rows.set(k, transfer(held, mean, call + stride, call), *past)
        else:
            outputs = [rows.m, *past]
            order = 4 if not skip else min(max(k, 1), 4)
            rows.set(k, transfer(x, _adams_bashforth(order, outputs), call, call - stride), *outputs[:3], x)
    return rows.table()


def _pndm_calls(grid: Array, half: int) -> Array:
    """Start, twice the middle, and end of three steps, and the timesteps after them."""
    ends = grid[1 : _RUNGE_KUTTA_STEPS + 1]
    stages = np.stack([grid[:_RUNGE_KUTTA_STEPS], ends + half, ends + half, ends], axis=1)
    return np.concatenate([stages.ravel(), grid[_RUNGE_KUTTA_STEPS:]])


def _transfer(bar: Array, velocity: bool, x: Array, m: Array, s: int, t: int) -> Array:
    """Equation 9: x at timestep t from x and the model output at timestep s; the last of `bar` is that before 0."""
    now, then = bar[s], bar[max(t, -1)]
    noise = np.sqrt(now) * m + np.sqrt(1 - now) * x if velocity else m
    scale = now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then)
    return np.asarray(np.sqrt(then / now) * x - (then - now) / scale * noise)


def _adams_bashforth(order: int, slopes: list[Array]) -> Array:
    return np.asarray(np.tensordot(_ADAMS_BASHFORTH[order - 1], slopes[:order], 1))


def ipndm(config: Config, steps: Steps) -> Table:
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", F-PNDM without its first steps.

    The model predicts v of x = α · image + β · noise; timesteps are angles between 1 and 0.
    """
    takes(steps)
    count = count_of(config, steps)
    if steps.start:
        raise RequestError("ipndm cannot start from an image: choose another --scheduler")
    if config.get("trained_betas") is not None:
        beta = as_float32(config.get("trained_betas"))
    else:
        angle = np.append(linspace32(1, 0, count + 1)[:-1], np.float32(0)) * np.float32(np.pi) / np.float32(2)
        beta = np.sin(angle.astype(np.float64)).astype(np.float32) ** 2
    beta = np.asarray(beta, np.float32)
    alpha = np.sqrt(1 - beta**2)
    timesteps = np.arctan2(beta, alpha).astype(np.float64)[:-1] / np.pi * 2
    alpha, beta = alpha.astype(np.float64), beta.astype(np.float64)
    rows = TableBuilder(timesteps, alpha[:-1], beta[:-1], registers=len(_ADAMS_BASHFORTH))
    for k in rows.calls:
        slopes = [beta[k] * rows.x + alpha[k] * rows.m, *rows.registers[1:]]
        slope = _adams_bashforth(min(k + 1, 4), slopes)
        x0 = (rows.x - beta[k] * slope) / max(alpha[k], _SMALLEST_ALPHA)
        rows.set(k, alpha[k + 1] * x0 + beta[k + 1] * slope, *slopes[:3])
    return rows.table()
