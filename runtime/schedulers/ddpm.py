"""DDPM."""

from __future__ import annotations

import numpy as np

from ...bundle import RequestError
from .config import Config, alphas_cumprod, check_range, clip_range, predicted_x0, refuse, spaced_timesteps, train_steps
from .table import Table, empty


def ddpm(config: Config, steps: int) -> Table:
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7, over a subset of timesteps."""
    refuse(config, thresholding=False)
    total = train_steps(config, steps)
    bar = alphas_cumprod(config)
    timesteps = check_range(np.round(spaced_timesteps(config, steps, "leading")), total)
    now = timesteps.astype(int)
    bar_now, bar_before = bar[now], np.append(bar[now[1:]], 1.0)
    alpha = bar_now / bar_before
    beta = 1 - alpha
    table = empty(timesteps, 1, clip=clip_range(config, True))
    p, q = predicted_x0(config, np.sqrt(bar_now), np.sqrt(1 - bar_now))
    table.x0[:] = np.stack([p, q], axis=1)
    to_x0 = np.sqrt(bar_before) * beta / (1 - bar_now)
    table.A[:, 0, 0] = np.sqrt(alpha) * (1 - bar_before) / (1 - bar_now)
    if np.isinf(table.clip):
        table.A[:, 0, 0] += to_x0 * p
        table.b[:, 0] = to_x0 * q
    else:
        table.d[:, 0] = to_x0
    table.c[:, 0] = np.where(timesteps > 0, _deviation(config, beta, bar_now, bar_before), 0.0)
    return table


def _deviation(config: Config, beta: np.ndarray, bar_now: np.ndarray, bar_before: np.ndarray) -> np.ndarray:
    kind = config.get("variance_type") or "fixed_small"
    small = np.maximum((1 - bar_before) / (1 - bar_now) * beta, 1e-20)
    if kind in ("fixed_small", "fixed_small_log"):
        return np.asarray(np.sqrt(small))
    if kind == "fixed_large":
        return np.asarray(np.sqrt(beta))
    raise RequestError(f"the scheduler option variance_type={kind!r} is not supported: choose another --scheduler")
