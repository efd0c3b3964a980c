"""Heun's method."""

from __future__ import annotations

import numpy as np

from .config import Config, clip_range
from .euler import first_scale, sigma_levels, sigma_x0
from .spacing import as_float32, sigma_schedule, takes, training_sigmas
from .table import Rows, Steps, Table


def heun(config: Config, steps: Steps) -> Table:
    """Karras et al. 2022, algorithm 1: an Euler step, then the mean of the slopes at its two ends; two calls a step.

    The last step, to σ = 0, is Euler's and makes one call.
    """
    takes(steps, "timesteps")
    config.lacks("rescale_betas_zero_snr")
    config.defaults(beta_start=0.00085, beta_end=0.012)
    config.one_of("prediction_type", "epsilon", "v_prediction", "sample")
    timesteps, sigmas = sigma_schedule(config, steps, training_sigmas(config, "exp"))
    sigmas = as_float32(np.append(sigmas, 0.0))
    now = np.repeat(sigmas[:-1], 2)[1:]
    p, q = sigma_x0(config, now)
    calls = np.repeat(timesteps, 2)[1:]
    rows = Rows(calls, sigma_levels(now), 2, start=2 * steps.start, clip=clip_range(config, False))
    rows.input_scale = 1 / np.sqrt(now**2 + 1)
    middle = rows.kept[1]
    for k in range(2 * steps.start, len(calls)):
        step = sigmas[k // 2 + 1] - sigmas[k // 2]
        slope = (rows.x - rows.predicted(k, p[k], q[k])) / now[k]
        if k % 2 == 0:
            rows.set(k, rows.x + step * slope, rows.x + step / 2 * slope)
        else:
            rows.set(k, middle + step / 2 * slope)
    return rows.table(first_scale(config, sigmas))
