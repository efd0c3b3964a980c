"""TCD."""

from __future__ import annotations

import numpy as np

from .config import Config, predicted_noise, predicted_x0
from .lcm import distilled_timesteps
from .table import Rows, Steps, Table


def tcd(config: Config, steps: Steps) -> Table:
    """Zheng et al. 2024, "Trajectory Consistency Distillation", strategic stochastic sampling.

    `eta` is the paper's γ: each step goes to timestep s = (1 − γ)·t of the next t, and noise takes it up again to t.
    Left out it is 0, which diffusers' pipelines pass; the 0.3 of its bare `step` reaches no picture.
    """
    eta = float(config.get("eta", 0.0))
    now, bar = distilled_timesteps(config, steps)
    alpha, sigma = np.sqrt(bar[now]), np.sqrt(1 - bar[now])
    after = np.append(now[1:], 0)
    lower = np.floor(np.float32(1 - eta) * after.astype(np.float32)).astype(int)
    p, q = predicted_x0(config, alpha, sigma)
    u, v = predicted_noise(config, alpha, sigma)
    rows = Rows(now, np.stack([alpha, sigma], axis=1), start=steps.start)
    for k in range(steps.start, len(now)):
        noise = u[k] * rows.x + v[k] * rows.m
        x = np.sqrt(bar[lower[k]]) * rows.predicted(k, p[k], q[k]) + np.sqrt(1 - bar[lower[k]]) * noise
        kept = bar[after[k]] / bar[lower[k]]
        draws = eta > 0 and k < len(now) - 1
        rows.set(k, np.sqrt(kept) * x + np.sqrt(1 - kept) * rows.noise if draws else x, draws=draws)
    return rows.table()
