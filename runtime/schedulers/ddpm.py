"""DDPM and DDIM."""

from __future__ import annotations

import numpy as np

from ...common.errors import RequestError
from .config import Config, alphas_cumprod, clip_range, predictions, train_steps
from .spacing import alpha_sigma_of, custom_timesteps, ddim_timesteps, takes
from .table import Steps, Table, TableBuilder


def ddpm(config: Config, steps: Steps) -> Table:
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7, over a subset of timesteps."""
    takes(steps, "timesteps")
    config.refuse(thresholding=False)
    bar = alphas_cumprod(config, "sigmoid", "laplace")
    asked = custom_timesteps(config, steps, whole=True)
    timesteps = ddim_timesteps(config, steps) if asked is None else asked
    now = timesteps.astype(int)
    bar_now, bar_before = bar[now], np.append(bar[now[1:]], 1.0)
    alpha = bar_now / bar_before
    beta = 1 - alpha
    to_x = np.sqrt(alpha) * (1 - bar_before) / (1 - bar_now)
    to_x0 = np.sqrt(bar_before) * beta / (1 - bar_now)
    kind = config.one_of("variance_type", "fixed_small", "fixed_small_log", "fixed_large", None)
    variance = beta if kind == "fixed_large" else np.maximum((1 - bar_before) / (1 - bar_now) * beta, 1e-20)
    levels = alpha_sigma_of(bar_now)
    x0, _ = predictions(config, *levels)
    rows = TableBuilder(timesteps, *levels, x0, start=steps.start, clip=clip_range(config, True))
    for k in rows.calls:
        mean = to_x0[k] * rows.predicted(k) + to_x[k] * rows.x
        noisy = timesteps[k] > 0
        rows.set(k, mean + noisy * np.sqrt(variance[k]) * rows.noise, draws=noisy)
    return rows.table()


def ddim(config: Config, steps: Steps) -> Table:
    """Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12; `eta` of 0 is deterministic, 1 is DDPM.

    `use_clipped_model_output` derives the noise from the clamped x0, as GLIDE does.
    """
    takes(steps)
    config.refuse(thresholding=False)
    eta = float(config.get("eta", 0.0))
    clipped = config.get("use_clipped_model_output", False)
    bar = alphas_cumprod(config)
    timesteps = ddim_timesteps(config, steps)
    now = timesteps.astype(int)
    before = now - train_steps(config) // steps.count
    final = 1.0 if config.get("set_alpha_to_one", True) else bar[0]
    bar_now, bar_before = bar[now], np.where(before >= 0, bar[before], final)
    alpha, sigma = alpha_sigma_of(bar_now)
    deviation = eta * np.sqrt((1 - bar_before) / (1 - bar_now) * (1 - bar_now / bar_before))
    x0, (u, v) = predictions(config, alpha, sigma)
    rows = TableBuilder(timesteps, alpha, sigma, x0, start=steps.start, clip=clip_range(config, True))
    for k in rows.calls:
        x0_k = rows.predicted(k)
        noise = (rows.x - alpha[k] * x0_k) / sigma[k] if clipped else u[k] * rows.x + v[k] * rows.m
        new = np.sqrt(bar_before[k]) * x0_k + np.sqrt(1 - bar_before[k] - deviation[k] ** 2) * noise
        rows.set(k, new + deviation[k] * rows.noise, draws=eta > 0)
    return rows.table()


def ddim_inverse(config: Config, steps: Steps) -> Table:
    """The same equation with η = 0 run backwards, from an image to the noise that DDIM makes it of."""
    takes(steps)
    if steps.start:
        raise RequestError("ddim-inverse goes from an image to noise, so it has no later start: leave the start at 0")
    bar = alphas_cumprod(config)
    config.one_of("timestep_spacing", "leading", "trailing")
    timesteps = ddim_timesteps(config, steps)[::-1]
    after = timesteps.astype(int)
    now = after - train_steps(config) // steps.count
    initial = 1.0 if config.get("set_alpha_to_one", True) else bar[0]
    bar_now, bar_after = np.where(now >= 0, bar[now], initial), bar[after]
    levels = alpha_sigma_of(bar_now)
    x0, (u, v) = predictions(config, *levels)
    rows = TableBuilder(timesteps, *levels, x0, clip=clip_range(config, True))
    for k in rows.calls:
        noise = u[k] * rows.x + v[k] * rows.m
        rows.set(k, np.sqrt(bar_after[k]) * rows.predicted(k) + np.sqrt(1 - bar_after[k]) * noise)
    return rows.table()
