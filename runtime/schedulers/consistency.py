"""Samplers of consistency-distilled models: LCM and TCD."""

from __future__ import annotations

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, alphas_cumprod, clip_range, predictions, train_steps
from .spacing import alpha_sigma_of, custom_timesteps, takes
from .table import Steps, Table, TableBuilder

_SIGMA_DATA = 0.5


def lcm(config: Config, steps: Steps) -> Table:
    """Luo et al. 2023, "Latent Consistency Models", algorithm 3 with the boundary scalings of its equation 3."""
    config.refuse(thresholding=False)
    now, bar = _distilled(config, steps)
    levels = alpha_sigma_of(bar[now])
    scaled = now * float(config.get("timestep_scaling", 10.0))
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
    after = np.append(bar[now[1:]], 1.0)
    x0, _ = predictions(config, *levels)
    rows = TableBuilder(now, *levels, x0, start=steps.start, clip=clip_range(config, False))
    for k in rows.calls:
        denoised = c_out[k] * rows.predicted(k) + c_skip[k] * rows.x
        more = k < len(now) - 1
        rows.set(k, np.sqrt(after[k]) * denoised + more * np.sqrt(1 - after[k]) * rows.noise, draws=more)
    return rows.table()


def tcd(config: Config, steps: Steps) -> Table:
    """Zheng et al. 2024, "Trajectory Consistency Distillation", strategic stochastic sampling.

    `eta` is the paper's γ: each step goes to timestep s = (1 − γ)·t of the next t, and noise takes it up again to t.
    Left out it is 0, which diffusers' pipelines pass; the 0.3 of its bare `step` reaches no picture.
    """
    eta = float(config.get("eta", 0.0))
    now, bar = _distilled(config, steps)
    levels = alpha_sigma_of(bar[now])
    after = np.append(now[1:], 0)
    target = np.floor(np.float32(1 - eta) * after.astype(np.float32)).astype(int)
    x0, (u, v) = predictions(config, *levels)
    rows = TableBuilder(now, *levels, x0, start=steps.start)
    for k in rows.calls:
        noise = u[k] * rows.x + v[k] * rows.m
        x = np.sqrt(bar[target[k]]) * rows.predicted(k) + np.sqrt(1 - bar[target[k]]) * noise
        ratio = bar[after[k]] / bar[target[k]]
        draws = eta > 0 and k < len(now) - 1
        rows.set(k, np.sqrt(ratio) * x + np.sqrt(1 - ratio) * rows.noise if draws else x, draws=draws)
    return rows.table()


def _distilled(config: Config, steps: Steps) -> tuple[Array, Array]:
    """The whole timesteps of a consistency-distilled model, evenly picked among those of its distillation, and ᾱ.

    Raises `RequestError` for more steps than the distillation had.
    """
    takes(steps, "timesteps")
    config.defaults(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    total, original = train_steps(config), int(config.get("original_inference_steps", 50))
    if original > total:
        raise RequestError(f"original_inference_steps must be between 1 and {total}, found {original}")
    asked, bar = custom_timesteps(config, steps, whole=True), alphas_cumprod(config)
    if asked is not None:
        return asked.astype(int), bar
    part = 1.0 if steps.strength is None else steps.strength
    known = int(original * part)
    if not 1 <= steps.count <= known:
        allowed = f"original_inference_steps={original}" + (f" at strength {part:g}" if part < 1 else "")
        raise RequestError(f"steps must be between 1 and {known} of {allowed}, found {steps.count}")
    schedule = (np.arange(1, known + 1) * (total // original) - 1)[::-1]
    return schedule[np.linspace(0, known, steps.count, endpoint=False).astype(int)], bar
