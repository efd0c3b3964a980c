"""Euler, and Euler with ancestral noise."""

from __future__ import annotations

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, linspace32
from .spacing import (
    along_curve,
    as_float32,
    at_timesteps,
    chosen_timesteps,
    custom_sigmas,
    sigma_schedule,
    takes,
    timesteps_of,
    training_sigmas,
    with_final,
)
from .table import Steps, Table, TableBuilder

_MOST_CHURN = np.sqrt(2) - 1


def euler(config: Config, steps: Steps) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2, order 1.

    The model sees x before the churn, as one call a step allows.
    """
    takes(steps, "timesteps", "sigmas")
    timesteps, sigmas = _schedule(config, steps)
    now = sigmas[: len(timesteps)]
    churn = churned(config, sigmas[:-1])
    p, q = x0 = sigma_x0(config, churn[0][: len(now)] if config.get("prediction_type", "epsilon") == "epsilon" else now)
    rows = TableBuilder(timesteps, 1.0, now, x0, start=steps.start, input_scale=c_in(now))
    churned_euler(rows, sigmas, churn, p)
    return rows.table(first_scale(config, sigmas))


def _schedule(config: Config, steps: Steps) -> tuple[Array, Array]:
    """Timesteps and at least one sigma more: log-linear ones do not end at the final sigma but one before."""
    train = training_sigmas(config)
    continuous = config.one_of("timestep_type", "discrete", "continuous") == "continuous"
    continuous = continuous and config.get("prediction_type") == "v_prediction"
    if continuous and steps.timesteps is not None:
        raise RequestError("timesteps cannot be chosen where timestep_type is 'continuous': choose sigmas")
    log_linear = config.one_of("interpolation_type", "linear", "log_linear") == "log_linear"
    sigmas = custom_sigmas(steps)
    if sigmas is not None:
        timesteps = timesteps_of(sigmas[:-1], train)
    else:
        timesteps = chosen_timesteps(config, steps)
        if log_linear:
            high, low = np.log(train[[-1, 0]].astype(np.float32))
            count = steps.count if steps.timesteps is None else len(timesteps)
            sigmas = as_float32(np.exp(linspace32(high, low, count + 1).astype(np.float64)))
        else:
            sigmas = at_timesteps(timesteps, train)
        timesteps, sigmas = along_curve(config, steps, timesteps, sigmas, train)
        sigmas = with_final(config, sigmas, train)
    return (0.25 * np.log(sigmas[:-1]) if continuous else timesteps), sigmas


def churned(config: Config, sigmas: Array) -> tuple[Array, Array]:
    """σ̂ and the deviation of the noise from σ up to it: `s_churn`, `s_tmin`, `s_tmax` and `s_noise` of Karras 2022."""
    low, high = float(config.get("s_tmin", 0.0)), float(config.get("s_tmax", np.inf))
    gamma = min(float(config.get("s_churn", 0.0)) / len(sigmas), _MOST_CHURN)
    hat = np.where((low <= sigmas) & (sigmas <= high), (1 + gamma) * sigmas, sigmas)
    return hat, float(config.get("s_noise", 1.0)) * np.sqrt(hat**2 - sigmas**2)


def churned_euler(rows: TableBuilder, sigmas: Array, churn: tuple[Array, Array], p: Array) -> None:
    """Set all rows to Euler steps along `sigmas`; churn: σ̂ and its deviation; p: the weight of x in x0."""
    hat, deviation = churn
    for k in rows.calls:
        jump = deviation[k] * rows.noise
        slope = (rows.x + jump - rows.predicted(k) - p[k] * jump) / hat[k]
        rows.set(k, rows.x + jump + (sigmas[k + 1] - hat[k]) * slope, draws=bool(hat[k] > sigmas[k]))


def c_in(sigmas: Array, data: float = 1.0) -> Array:
    """What scales x = image + σ · noise to deviation 1, where the image has the deviation `data`."""
    return np.asarray(1 / np.sqrt(sigmas**2 + data**2))


def sigma_builder(
    config: Config,
    timesteps: Array,
    sigmas: Array,
    seen: Array | None = None,
    *,
    registers: int = 1,
    start: int,
    clip: float = np.inf,
) -> TableBuilder:
    """An empty table over x = image + σ · noise; seen: the σ at which the model is called where it is not `sigmas`."""
    seen = sigmas if seen is None else seen
    x0 = sigma_x0(config, seen)
    return TableBuilder(timesteps, 1.0, sigmas, x0, registers, start=start, clip=clip, input_scale=c_in(seen))


def sigma_x0(config: Config, sigmas: Array) -> tuple[Array, Array]:
    """x0 = p·x + q·m for x = image + σ · noise, where the model saw x/√(σ² + 1)."""
    prediction = config.one_of("prediction_type", "epsilon", "v_prediction", "sample", "original_sample")
    if prediction == "epsilon":
        return np.ones_like(sigmas), -sigmas
    if prediction == "v_prediction":
        return 1 / (sigmas**2 + 1), -sigmas / np.sqrt(sigmas**2 + 1)
    return np.zeros_like(sigmas), np.ones_like(sigmas)


def first_scale(config: Config, sigmas: Array) -> float:
    """The deviation of the first x: σ_max, or √(σ_max² + 1) where the spacing does not begin at the last timestep."""
    largest = float(sigmas.max())
    leading = config.get("timestep_spacing", "linspace") == "leading"
    return float(np.sqrt(largest**2 + 1)) if leading else largest


def euler_ancestral(config: Config, steps: Steps) -> Table:
    """Euler down to σ_down, then noise of deviation σ_up (Song et al. 2021, appendix F, as k-diffusion has it)."""
    takes(steps)
    config.lacks("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    config.one_of("prediction_type", "epsilon", "v_prediction")
    timesteps, sigmas = sigma_schedule(config, steps, training_sigmas(config))
    now, then = sigmas[:-1], sigmas[1:]
    # `ancestral_step` without its differences of squares, which float64 need not take
    down, up = then**2 / now, then * np.sqrt(now**2 - then**2) / now
    rows = sigma_builder(config, timesteps, now, start=steps.start)
    for k in rows.calls:
        rows.set(k, rows.x + (down[k] - now[k]) * rows.to_d(k, now[k]) + up[k] * rows.noise, draws=True)
    return rows.table(first_scale(config, sigmas))


def ancestral_step(sigmas: Array) -> tuple[Array, Array]:
    """σ_down and σ_up of each step from one of `sigmas` to the next: σ_down² + σ_up² is the square of the next."""
    now, then = sigmas[:-1], sigmas[1:]
    up = np.sqrt(then**2 * (now**2 - then**2) / now**2)
    return np.sqrt(then**2 - up**2), up
