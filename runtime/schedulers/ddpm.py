"""DDPM."""

from __future__ import annotations

import numpy as np

from ...common.arrays import Array
from .config import Config, alphas_cumprod, clip_range, predicted_x0
from .spacing import alpha_sigma_of, ddim_timesteps, takes, whole_timesteps
from .table import Steps, Table, TableBuilder


def ddpm(config: Config, steps: Steps) -> Table:
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7, over a subset of timesteps."""
    takes(steps, "timesteps")
    config.refuse(thresholding=False)
    config.one_of("prediction_type", "epsilon", "sample", "v_prediction")
    bar = alphas_cumprod(config, "sigmoid", "laplace")
    asked = whole_timesteps(config, steps)
    timesteps = ddim_timesteps(config, steps) if asked is None else asked
    now = timesteps.astype(int)
    bar_now, bar_before = bar[now], np.append(bar[now[1:]], 1.0)
    alpha = bar_now / bar_before
    beta = 1 - alpha
    to_x = np.sqrt(alpha) * (1 - bar_before) / (1 - bar_now)
    to_x0 = np.sqrt(bar_before) * beta / (1 - bar_now)
    deviation = _deviation(config, beta, bar_now, bar_before)
    levels = alpha_sigma_of(bar_now)
    x0 = predicted_x0(config, *levels)
    rows = TableBuilder(timesteps, *levels, x0, start=steps.start, clip=clip_range(config, True))
    for k in rows.calls:
        mean = to_x0[k] * rows.predicted(k) + to_x[k] * rows.x
        noisy = timesteps[k] > 0
        rows.set(k, mean + noisy * deviation[k] * rows.noise, draws=noisy)
    return rows.table()


def _deviation(config: Config, beta: Array, bar_now: Array, bar_before: Array) -> Array:
    kind = config.one_of("variance_type", "fixed_small", "fixed_small_log", "fixed_large", None)
    if kind == "fixed_large":
        return np.asarray(np.sqrt(beta))
    return np.asarray(np.sqrt(np.maximum((1 - bar_before) / (1 - bar_now) * beta, 1e-20)))
