"""DDIM."""

from __future__ import annotations

import numpy as np

from .config import Config, alphas_cumprod, check_range, clip_range, predicted_x0, refuse, spaced_timesteps, train_steps
from .table import Table, empty


def ddim(config: Config, steps: int) -> Table:
    """Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12 with η = 0."""
    refuse(config, thresholding=False)
    total = train_steps(config, steps)
    bar = alphas_cumprod(config)
    timesteps = check_range(np.round(spaced_timesteps(config, steps, "leading")), total)
    now = timesteps.astype(int)
    before = now - total // steps
    final = 1.0 if config.get("set_alpha_to_one", True) else bar[0]
    bar_now, bar_before = bar[now], np.where(before >= 0, bar[before], final)
    alpha, sigma = np.sqrt(bar_now), np.sqrt(1 - bar_now)
    table = empty(timesteps, 1, clip=clip_range(config, True))
    p, q = predicted_x0(config, alpha, sigma)
    table.x0[:] = np.stack([p, q], axis=1)
    # noise = u·x + v·m, written so that sigma = 0 divides nothing
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "epsilon":
        u, v = np.zeros(steps), np.ones(steps)
    elif prediction == "v_prediction":
        u, v = sigma, alpha
    else:
        u, v = 1 / sigma, -alpha / sigma
    to_x0, to_noise = np.sqrt(bar_before), np.sqrt(1 - bar_before)
    table.A[:, 0, 0], table.b[:, 0] = to_noise * u, to_noise * v
    if np.isinf(table.clip):
        table.A[:, 0, 0] += to_x0 * p
        table.b[:, 0] += to_x0 * q
    else:
        table.d[:, 0] = to_x0
    return table
