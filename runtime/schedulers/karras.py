"""Samplers in the variables of Karras et al. 2022, x = image + σ · noise: Euler, Heun, LMS and DPM-Solver-2."""

from __future__ import annotations

import numpy as np
from numpy.polynomial.polynomial import polyfromroots, polyint

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, Line, clip_range, linspace32
from .spacing import (
    as_float32,
    at_timesteps,
    count_of,
    curve,
    custom_sigmas,
    custom_timesteps,
    even_timesteps,
    final_sigma,
    takes,
    timesteps_of,
    training_sigmas,
)
from .table import Steps, Table, TableBuilder

_MOST_CHURN = np.sqrt(2) - 1


def euler(config: Config, steps: Steps) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2, order 1.

    The model sees x before the churn, as one call a step allows.
    """
    takes(steps, "timesteps", "sigmas")
    timesteps, sigmas = _euler_schedule(config, steps)
    now = sigmas[: len(timesteps)]
    churn = churned(config, sigmas[:-1])
    seen = churn[0][: len(now)] if config.get("prediction_type", "epsilon") == "epsilon" else now
    p, _ = x0 = _x0(config, seen, "sample", "original_sample")
    rows = TableBuilder(timesteps, 1.0, now, x0, start=steps.start, input_scale=c_in(now))
    churned_euler(rows, sigmas, churn, p)
    return rows.table(_first_scale(config, sigmas))


def _euler_schedule(config: Config, steps: Steps) -> tuple[Array, Array]:
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
        timesteps, sigmas = _schedule(config, steps, train, final=final_sigma(config, train), log_linear=log_linear)
    return (0.25 * np.log(sigmas[:-1]) if continuous else timesteps), sigmas


def euler_ancestral(config: Config, steps: Steps) -> Table:
    """Euler down to σ_down, then noise of deviation σ_up (Song et al. 2021, appendix F, as k-diffusion has it)."""
    takes(steps)
    config.lacks("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    timesteps, sigmas = _schedule(config, steps, training_sigmas(config))
    now, then = sigmas[:-1], sigmas[1:]
    # without differences of squares of their own, which float64 need not take
    down, up = then**2 / now, then * np.sqrt(now**2 - then**2) / now
    rows = TableBuilder(timesteps, 1.0, now, _x0(config, now), start=steps.start, input_scale=c_in(now))
    for k in rows.calls:
        rows.set(k, rows.x + (down[k] - now[k]) * rows.to_d(k, now[k]) + up[k] * rows.noise, draws=True)
    return rows.table(_first_scale(config, sigmas))


def heun(config: Config, steps: Steps) -> Table:
    """Karras et al. 2022, algorithm 1: an Euler step, then the mean of the slopes at its two ends; two calls a step.

    The last step, to σ = 0, is Euler's and makes one call.
    """
    takes(steps, "timesteps")
    config.lacks("rescale_betas_zero_snr")
    config.defaults(beta_start=0.00085, beta_end=0.012)
    timesteps, sigmas = _schedule(config, steps, training_sigmas(config, "exp"))
    timesteps, now = (np.repeat(each, 2)[1:] for each in (timesteps, sigmas[:-1]))
    x0, clip = _x0(config, now, "sample"), clip_range(config, False)
    rows = TableBuilder(timesteps, 1.0, now, x0, 2, start=2 * steps.start, clip=clip, input_scale=c_in(now))
    middle = rows.registers[1]
    for k in rows.calls:
        step = sigmas[k // 2 + 1] - sigmas[k // 2]
        slope = rows.to_d(k, now[k])
        if k % 2 == 0:
            rows.set(k, rows.x + step * slope, rows.x + step / 2 * slope)
        else:
            rows.set(k, middle + step / 2 * slope)
    return rows.table(_first_scale(config, sigmas))


def lms(config: Config, steps: Steps) -> Table:
    """Bashforth & Adams 1883 on uneven sigmas, as k-diffusion has it: the polynomial through the slopes, integrated.

    A run that starts later has no past slopes yet, and leaves their terms out of the higher order's sum.
    """
    takes(steps)
    config.lacks("rescale_betas_zero_snr")
    if config.get("use_karras_sigmas"):
        config.lacks("sigma_min", "sigma_max")
    most = min(int(config.get("order", 4)), steps.count + 1)
    timesteps, sigmas = _schedule(config, steps, training_sigmas(config))
    now, x0 = sigmas[:-1], _x0(config, sigmas[:-1], "sample")
    rows = TableBuilder(timesteps, 1.0, now, x0, most, start=steps.start, input_scale=c_in(now))
    for k in rows.calls:
        slopes = [rows.to_d(k, sigmas[k]), *rows.registers[1:]]
        weights = _integrals(sigmas[max(k + 1 - most, 0) : k + 1][::-1], sigmas[k + 1])[: k - steps.start + 1]
        rows.set(k, rows.x + sum(w * slope for w, slope in zip(weights, slopes, strict=False)), *slopes[: most - 1])
    return rows.table(_first_scale(config, sigmas))


def _integrals(nodes: Array, end: float) -> Array:
    """The integral from nodes[0] to `end` of each Lagrange polynomial of `nodes`."""
    length = end - nodes[0]
    scaled = (nodes - nodes[0]) / length
    areas = []
    for j, node in enumerate(scaled):
        others = np.delete(scaled, j)
        areas.append(polyint(polyfromroots(others)).sum() / np.prod(node - others))
    return np.asarray(length * np.array(areas))


def kdpm2(config: Config, steps: Steps, *, ancestral: bool = False) -> Table:
    """Lu et al. 2022, "DPM-Solver", DPM-Solver-2 in the variables of Karras et al. 2022: the slope at √(σ · σ_next).

    Two calls a step; the last step, to σ = 0, is Euler's and makes one.
    ancestral: down to σ_down, and noise of deviation σ_up back up, drawn at every second call.
    """
    takes(steps)
    config.lacks("rescale_betas_zero_snr")
    config.defaults(beta_start=0.00085, beta_end=0.012)
    train = training_sigmas(config)
    timesteps, sigmas = _schedule(config, steps, train)
    timesteps = timesteps.round() if config.get("use_karras_sigmas") else timesteps
    now, down, up = sigmas[:-1], sigmas[1:], np.zeros(len(sigmas) - 1)
    if ancestral:
        # in float32 like diffusers: σ_down is what is left of a difference that is small beside large sigmas
        now32, then32 = sigmas.astype(np.float32)[:-1], sigmas.astype(np.float32)[1:]
        up = np.sqrt(then32**2 * (now32**2 - then32**2) / now32**2)
        down, up = (values.astype(np.float64) for values in (np.sqrt(then32**2 - up**2), up))
    # diffusers' KDPM2 takes the middle from the far end
    first, second = (now, down) if ancestral else (down, now)
    # √(first · second), the middle of their logarithms, in the float32 steps in which diffusers takes it
    low, high = (np.log(ends).astype(np.float32) for ends in (first, second))
    middles = as_float32(np.exp((high - (high - low) * np.float32(0.5)).astype(np.float64)))
    middles = np.where(first * second > 0, middles, 0.0)
    calls = np.stack([timesteps, timesteps_of(middles, train)], 1).ravel()[:-1]
    seen = np.stack([now, middles], 1).ravel()[:-1]
    x0, levels = _x0(config, seen), np.repeat(now, 2)[1:]
    rows = TableBuilder(calls, 1.0, levels, x0, 2, start=2 * steps.start, input_scale=c_in(seen))
    before = rows.registers[1]
    for k in rows.calls:
        i, slope = k // 2, rows.to_d(k, seen[k])
        if k % 2 == 0:
            rows.set(k, rows.x + (middles[i] - now[i]) * slope, rows.x)
        else:
            rows.set(k, before + (down[i] - now[i]) * slope + up[i] * rows.noise, draws=ancestral)
    return rows.table(_first_scale(config, sigmas))


def _schedule(
    config: Config, steps: Steps, train: Array, *, final: float = 0.0, log_linear: bool = False
) -> tuple[Array, Array]:
    """Timesteps and sigmas, chosen, spaced as the config says, or along its sigma curve; after the last comes `final`.

    log_linear: even steps of log σ between the ends of training, one more than there are timesteps.
    """
    asked = custom_timesteps(config, steps)
    count = count_of(config, steps) if asked is None else len(asked)
    timesteps = as_float32(even_timesteps(config, count, "linspace")) if asked is None else asked
    sigmas = at_timesteps(timesteps, train)
    if log_linear:
        high, low = np.log(train[[-1, 0]].astype(np.float32))
        sigmas = as_float32(np.exp(linspace32(high, low, count + 1).astype(np.float64)))
    curved = curve(config, sigmas, count)
    if curved is not None:
        timesteps, sigmas = timesteps_of(curved, train), curved
    return timesteps, as_float32(np.append(sigmas, final))


def _x0(config: Config, sigmas: Array, *more: str) -> Line:
    """x0 = p·x + q·m, where the model saw x/√(σ² + 1). more: what it may predict beside the two that all take."""
    prediction = config.one_of("prediction_type", "epsilon", "v_prediction", *more)
    if prediction == "epsilon":
        return np.ones_like(sigmas), -sigmas
    if prediction == "v_prediction":
        return 1 / (sigmas**2 + 1), -sigmas / np.sqrt(sigmas**2 + 1)
    return np.zeros_like(sigmas), np.ones_like(sigmas)


def c_in(sigmas: Array, data: float = 1.0) -> Array:
    """What scales x to deviation 1, where the image has the deviation `data`."""
    return np.asarray(1 / np.sqrt(sigmas**2 + data**2))


def _first_scale(config: Config, sigmas: Array) -> float:
    """The deviation of the first x: σ_max, or √(σ_max² + 1) where the spacing does not begin at the last timestep."""
    largest = float(sigmas.max())
    leading = config.get("timestep_spacing", "linspace") == "leading"
    return float(np.sqrt(largest**2 + 1)) if leading else largest


def churned(config: Config, sigmas: Array, calls: int | None = None) -> tuple[Array, Array]:
    """σ̂ and the deviation of the noise from σ up to it: `s_churn`, `s_tmin`, `s_tmax` and `s_noise` of Karras 2022.

    calls: what the churn is spread over, as many as there are sigmas by default.
    """
    low, high = float(config.get("s_tmin", 0.0)), float(config.get("s_tmax", np.inf))
    gamma = min(float(config.get("s_churn", 0.0)) / (calls or len(sigmas)), _MOST_CHURN)
    hat = np.where((low <= sigmas) & (sigmas <= high), (1 + gamma) * sigmas, sigmas)
    return hat, float(config.get("s_noise", 1.0)) * np.sqrt(hat**2 - sigmas**2)


def churned_euler(rows: TableBuilder, sigmas: Array, churn: tuple[Array, Array], p: Array) -> None:
    """Set all rows to Euler steps along `sigmas`; churn: σ̂ and its deviation; p: the weight of x in x0."""
    hat, deviation = churn
    for k in rows.calls:
        jump = deviation[k] * rows.noise
        slope = (rows.x + jump - rows.predicted(k) - p[k] * jump) / hat[k]
        rows.set(k, rows.x + jump + (sigmas[k + 1] - hat[k]) * slope, draws=bool(hat[k] > sigmas[k]))
