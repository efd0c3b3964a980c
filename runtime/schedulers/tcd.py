"""TCD."""

from __future__ import annotations

import numpy as np

from .config import Config, predicted_noise, predicted_x0
from .lcm import distilled_timesteps
from .spacing import alpha_sigma_of
from .table import Steps, Table, TableBuilder


def tcd(config: Config, steps: Steps) -> Table:
    """Zheng et al. 2024, "Trajectory Consistency Distillation", strategic stochastic sampling.

    `eta` is the paper's γ: each step goes to timestep s = (1 − γ)·t of the next t, and noise takes it up again to t.
    Left out it is 0, which diffusers' pipelines pass; the 0.3 of its bare `step` reaches no picture.
    """
    eta = float(config.get("eta", 0.0))
    now, bar = distilled_timesteps(config, steps)
    levels = alpha_sigma_of(bar[now])
    after = np.append(now[1:], 0)
    target = np.floor(np.float32(1 - eta) * after.astype(np.float32)).astype(int)
    u, v = predicted_noise(config, *levels)
    rows = TableBuilder(now, *levels, predicted_x0(config, *levels), start=steps.start)
    for k in rows.calls:
        noise = u[k] * rows.x + v[k] * rows.m
        x = np.sqrt(bar[target[k]]) * rows.predicted(k) + np.sqrt(1 - bar[target[k]]) * noise
        kept = bar[after[k]] / bar[target[k]]
        draws = eta > 0 and k < len(now) - 1
        rows.set(k, np.sqrt(kept) * x + np.sqrt(1 - kept) * rows.noise if draws else x, draws=draws)
    return rows.table()
