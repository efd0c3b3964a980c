"""DDIM."""

from __future__ import annotations

import numpy as np

from .config import Config, alphas_cumprod, clip_range, predicted_noise, predicted_x0, train_steps
from .spacing import ddim_timesteps, takes
from .table import Rows, Steps, Table


def ddim(config: Config, steps: Steps) -> Table:
    """Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12; `eta` of 0 is deterministic, 1 is DDPM.

    `use_clipped_model_output` derives the noise from the clamped x0, as GLIDE does.
    """
    takes(steps)
    config.refuse(thresholding=False)
    config.one_of("prediction_type", "epsilon", "sample", "v_prediction")
    eta = float(config.get("eta", 0.0))
    clipped = config.get("use_clipped_model_output", False)
    bar = alphas_cumprod(config)
    timesteps = ddim_timesteps(config, steps, "leading")
    now = timesteps.astype(int)
    before = now - train_steps(config) // steps.count
    final = 1.0 if config.get("set_alpha_to_one", True) else bar[0]
    bar_now, bar_before = bar[now], np.where(before >= 0, bar[before], final)
    alpha, sigma = np.sqrt(bar_now), np.sqrt(1 - bar_now)
    p, q = predicted_x0(config, alpha, sigma)
    u, v = predicted_noise(config, alpha, sigma)
    deviation = eta * np.sqrt((1 - bar_before) / (1 - bar_now) * (1 - bar_now / bar_before))
    rows = Rows(timesteps, np.stack([alpha, sigma], 1), start=steps.start, clip=clip_range(config, True))
    for k in range(steps.start, len(timesteps)):
        x0 = rows.predicted(k, p[k], q[k])
        noise = (rows.x - alpha[k] * x0) / sigma[k] if clipped else u[k] * rows.x + v[k] * rows.m
        new = np.sqrt(bar_before[k]) * x0 + np.sqrt(1 - bar_before[k] - deviation[k] ** 2) * noise
        rows.set(k, new + deviation[k] * rows.noise, draws=eta > 0)
    return rows.table()
