"""LCM."""

from __future__ import annotations

import numpy as np

from ...bundle import RequestError
from .config import Config, alphas_cumprod, clip_range, predicted_x0, refuse, train_steps
from .table import Table, empty

_SIGMA_DATA = 0.5


def lcm(config: Config, steps: int) -> Table:
    """Luo et al. 2023, "Latent Consistency Models", algorithm 3 with the boundary scalings of its equation 3."""
    refuse(config, thresholding=False)
    total = train_steps(config, steps)
    original = int(config.get("original_inference_steps", 50))
    if not 1 <= original <= total:
        raise RequestError(f"original_inference_steps must be between 1 and {total}, found {original}")
    if steps > original:
        raise RequestError(f"lcm makes at most original_inference_steps={original} steps, found {steps}")
    bar = alphas_cumprod(config)
    schedule = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    now = schedule[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
    bar_now = bar[now]
    p, q = predicted_x0(config, np.sqrt(bar_now), np.sqrt(1 - bar_now))
    scaled = now * float(config.get("timestep_scaling", 10.0))
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
    bar_next = bar[now[1:]]
    to_denoised = np.append(np.sqrt(bar_next), 1.0)
    table = empty(now, 1, clip=clip_range(config, False))
    table.x0[:] = np.stack([p, q], axis=1)
    table.A[:, 0, 0] = to_denoised * c_skip
    if np.isinf(table.clip):
        table.A[:, 0, 0] += to_denoised * c_out * p
        table.b[:, 0] = to_denoised * c_out * q
    else:
        table.d[:, 0] = to_denoised * c_out
    table.c[:, 0] = np.append(np.sqrt(1 - bar_next), 0.0)
    return table
