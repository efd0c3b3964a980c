"""Heun's method."""

from __future__ import annotations

import numpy as np

from .config import Config, clip_range
from .euler import first_scale, sigma_builder
from .spacing import sigma_schedule, takes, training_sigmas
from .table import Steps, Table


def heun(config: Config, steps: Steps) -> Table:
    """Karras et al. 2022, algorithm 1: an Euler step, then the mean of the slopes at its two ends; two calls a step.

    The last step, to σ = 0, is Euler's and makes one call.
    """
    takes(steps, "timesteps")
    config.lacks("rescale_betas_zero_snr")
    config.defaults(beta_start=0.00085, beta_end=0.012)
    config.one_of("prediction_type", "epsilon", "v_prediction", "sample")
    timesteps, sigmas = sigma_schedule(config, steps, training_sigmas(config, "exp"))
    timesteps, now = (np.repeat(each, 2)[1:] for each in (timesteps, sigmas[:-1]))
    clip = clip_range(config, False)
    rows = sigma_builder(config, timesteps, now, registers=2, start=2 * steps.start, clip=clip)
    middle = rows.registers[1]
    for k in rows.calls:
        step = sigmas[k // 2 + 1] - sigmas[k // 2]
        slope = rows.to_d(k, now[k])
        if k % 2 == 0:
            rows.set(k, rows.x + step * slope, rows.x + step / 2 * slope)
        else:
            rows.set(k, middle + step / 2 * slope)
    return rows.table(first_scale(config, sigmas))
