"""Euler."""

from __future__ import annotations

import numpy as np

from ...bundle import RequestError
from .config import Config, alphas_cumprod, check_range, refuse, spaced_timesteps, train_steps
from .table import Table, empty

_SMALLEST_BAR = 2.0**-24
"""ᾱ at the last timestep of a zero-terminal-SNR schedule, so that sigma stays finite; diffusers' value."""


def sigmas_of(config: Config) -> np.ndarray:
    """σ_t = √((1 − ᾱ_t)/ᾱ_t) for each training timestep, of float32 precision."""
    bar = alphas_cumprod(config)
    if config.get("rescale_betas_zero_snr"):
        bar[-1] = _SMALLEST_BAR
    bar32 = bar.astype(np.float32)
    return np.asarray(np.sqrt((1 - bar32) / bar32), np.float64)


def final_sigma(config: Config, sigmas: np.ndarray) -> float:
    """σ after the last step, as `final_sigmas_type` says."""
    kind = config.get("final_sigmas_type", "zero")
    if kind not in ("zero", "sigma_min"):
        raise RequestError(f"final_sigmas_type {kind!r} is not supported: use zero or sigma_min")
    return 0.0 if kind == "zero" else float(sigmas[0])


def euler(config: Config, steps: int) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space of Diffusion Models", algorithm 2 (no churn)."""
    refuse(
        config,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        interpolation_type="linear",
        timestep_type="discrete",
    )
    total = train_steps(config, steps)
    timesteps = check_range(spaced_timesteps(config, steps, "linspace").astype(np.float32), total)
    train = sigmas_of(config)
    sigmas = np.append(np.interp(timesteps, np.arange(total), train), final_sigma(config, train))
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    now, step = sigmas[:-1], np.diff(sigmas)
    spacing = config.get("timestep_spacing", "linspace")
    largest = sigmas.max()
    table = empty(timesteps, 1, init_scale=largest if spacing != "leading" else float(np.sqrt(largest**2 + 1)))
    table.input_scale[:] = 1 / np.sqrt(now**2 + 1)
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "epsilon":
        p, q = np.ones(steps), -now
    elif prediction == "v_prediction":
        p, q = 1 / (now**2 + 1), -now / np.sqrt(now**2 + 1)
    elif prediction in ("sample", "original_sample"):
        p, q = np.zeros(steps), np.ones(steps)
    else:
        raise RequestError(f"prediction type {prediction!r} is not supported: use epsilon, sample or v_prediction")
    table.x0[:] = np.stack([p, q], axis=1)
    table.A[:, 0, 0] = 1 + step * (1 - p) / now
    table.b[:, 0] = -step * q / now
    return table
