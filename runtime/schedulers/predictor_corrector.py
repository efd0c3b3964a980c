"""Multistep methods that correct x once the model output at it is known: UniPC and SA-Solver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import factorial

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import BETAS, Config, alphas_cumprod, train_steps
from .dpm_solver import Schedule, integrating, schedule_of, solver_schedule, spaced
from .flow_match import time_shifted, within
from .spacing import CURVES, alpha_sigma_of, as_float32, final_sigma, takes, training_sigmas
from .table import Steps, Table, TableBuilder

_BELOW_ONE = 1e-6
"""How far a flow schedule that begins at pure noise begins below it, so that log α is finite; diffusers' value."""
_ORDERS = (1, 2, 3, 4)
_NOISY = 200, 800
"""The timesteps between which a step of SA-Solver is stochastic, τ = 1; outside of them τ = 0."""


def unipc(config: Config, steps: Steps) -> Table:
    """Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework", algorithms 1 (UniC) and 2 (UniP).

    A step first corrects x, now that the model output at it is known, and then predicts the next.
    Registers: x, the corrected x before, then the predictions before, newest first.
    """
    config.refuse(thresholding=False, solver_p=None)
    highest = min(int(config.get("solver_order", 2)), steps.count + 1)
    bh1 = config.one_of("solver_type", "bh2", "bh1", "midpoint", "heun", "logrho") == "bh1"
    uncorrected = config.get("disable_corrector", ())
    if not isinstance(uncorrected, (list, tuple)):
        raise RequestError("the scheduler option disable_corrector must be a list of steps, like [0, 1]")
    schedule = _schedule(config, steps)
    count = len(schedule.timesteps)
    rows = schedule.builder(highest + 2, steps.start)
    before, *past = rows.registers[1:]
    order = 0
    for k in rows.calls:
        prediction = schedule.predicted(rows, k)
        corrects = k > steps.start and k - 1 not in uncorrected
        x = _step(schedule, bh1, before, k - 1, past[:order], prediction) if corrects else rows.x
        order = min(highest, k - steps.start + 1, count - k if config.get("lower_order_final", True) else highest)
        if schedule.sigma[k + 1] == 0 and (bh1 or schedule.noise is not None or order > 1):
            raise RequestError(
                "solver_type=bh1, predict_x0=false and lower_order_final=false cannot end at sigma 0: "
                "set final_sigmas_type to sigma_min"
            )
        if schedule.log_snr[k + 1] == schedule.log_snr[k] and order > 2:
            raise RequestError("two noise levels are equal, where order 3 divides by zero: set solver_order to 2")
        history = [prediction, *past]
        rows.set(k, _step(schedule, bh1, x, k, history[:order]), x, *history[:highest])
    return rows.table()


def _step(schedule: Schedule, bh1: bool, x: Array, s: int, history: Sequence[Array], end: Array | None = None) -> Array:
    """x at time s + 1 from x at time s and the predictions at s, s − 1, … (UniP), and at s + 1 (UniC) as `end`.

    bh1: whether B(h) is h, else it is e^h − 1.
    """
    alpha, sigma, log_snr = schedule.alpha, schedule.sigma, schedule.log_snr
    h = log_snr[s + 1] - log_snr[s]
    ratios = [(log_snr[s - i] - log_snr[s]) / h for i in range(1, len(history))]
    chords = [(old - history[0]) / ratio for old, ratio in zip(history[1:], ratios, strict=True)]
    if end is not None:
        ratios, chords = [*ratios, 1.0], [*chords, end - history[0]]
    if schedule.noise is None:
        keep, scale, h = sigma[s + 1] / sigma[s], alpha[s + 1], -h
    else:
        keep, scale = alpha[s + 1] / alpha[s], sigma[s + 1]
    growth = np.expm1(h)
    bent = growth * history[0]
    if chords:
        b = h if bh1 else growth
        bent = bent + b * (_rho(h, b, np.array(ratios)) @ np.array(chords))
    return np.asarray(keep * x - scale * bent)


def _rho(h: float, b: float, ratios: Array) -> Array:
    """The weights of the chords by theorem 3.1, R·ρ = φ/B(h); a single one is taken as 1/2."""
    if len(ratios) == 1:
        return np.array([0.5])
    phi, moments = np.expm1(h) / h - 1, []
    for order in range(1, len(ratios) + 1):
        moments.append(phi * factorial(order) / b)
        phi = phi / h - 1 / factorial(order + 1)
    return _quadrature(ratios, np.array(moments))


def _schedule(config: Config, steps: Steps) -> Schedule:
    takes(steps, "sigmas", "mu")
    flow = bool(config.get("use_flow_sigmas", False))
    if config.get("use_dynamic_shifting", False) and steps.mu is None:
        raise RequestError("this schedule shifts with the size of the image: set mu, or use_dynamic_shifting to false")
    if not flow and (steps.sigmas is not None or config.get("shift_terminal") is not None):
        raise RequestError("sigmas of your own and shift_terminal need use_flow_sigmas: set it, or leave them out")
    train = training_sigmas(config)
    if steps.sigmas is not None and any(map(config.get, CURVES)):
        raise RequestError("sigmas cannot be chosen with a sigma curve: set one of them")
    config.lacks("use_lu_lambdas", "lambda_min_clipped")
    if flow and not any(map(config.get, CURVES)):
        config.unheeded(*BETAS)
    timesteps, sigmas, curved = spaced(config, steps, train, True, partial(_flow_sigmas, config, steps))
    if flow and config.get("use_karras_sigmas", False):
        sigmas = sigmas / (sigmas + 1)
        timesteps = np.trunc(sigmas * len(train))
    sigmas = as_float32(np.append(sigmas, final_sigma(config, sigmas[::-1] if curved else train)))
    schedule = schedule_of(config, steps, timesteps, sigmas)
    return integrating(config, schedule, bool(config.get("predict_x0", True)))


def _flow_sigmas(config: Config, steps: Steps) -> Array:
    """Sigmas of x = (1 − σ) · image + σ · noise, shifted towards noise."""
    even = np.linspace(1, 1 / train_steps(config), steps.count + 1)[:-1]
    sigmas = even if steps.sigmas is None else np.asarray(within("sigmas", steps.sigmas, 1), np.float64)
    sigmas = time_shifted(config, sigmas, steps.mu, "flow_shift")
    if abs(sigmas[0] - 1) < _BELOW_ONE:
        sigmas[0] -= _BELOW_ONE
    return sigmas


def sa_solver(config: Config, steps: Steps) -> Table:
    """Xue et al. 2023, "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", algorithm 1.

    A step first corrects x, now that the model output at it is known, and then predicts the next; both add the same
    noise. Registers: x, the corrected x before, the noise added to it, the predictions before, newest first.
    """
    takes(steps)
    config.lacks("rescale_betas_zero_snr", "use_lu_lambdas", "use_dynamic_shifting", "time_shift_type")
    config.refuse(tau_func=None)
    predictor, corrector = (config.one_of(name, 2, *_ORDERS) for name in ("predictor_order", "corrector_order"))
    if not config.get("use_flow_sigmas", False):
        config.lacks("flow_shift")
    image = config.one_of("algorithm_type", "data_prediction", "noise_prediction") == "data_prediction"
    schedule = integrating(config, solver_schedule(config, steps, rounds=True, repeats=True), image)
    count, start = len(schedule.timesteps), steps.start
    now = schedule.timesteps.astype(int)
    if now.max() >= train_steps(config):
        raise RequestError(f"timestep {now.max()} is past those that the model was trained with: ask for fewer steps")
    levels = alpha_sigma_of(alphas_cumprod(config)[now])
    tau = (schedule.timesteps >= _NOISY[0]) & (schedule.timesteps <= _NOISY[1])
    rows = TableBuilder(schedule.timesteps, *levels, schedule.x0, max(predictor, corrector) + 2, start=start)
    before, last_noise, *past = rows.registers[1:]
    final = bool(config.get("lower_order_final", True))
    advance = partial(_sa_step, schedule, tau)
    for k in rows.calls:
        done = k - start
        history = [schedule.predicted(rows, k), *past]
        x = rows.x
        if done:
            order = min(corrector, done + 1, *([count - k + 2] if final else []))
            x = advance(before, k - 1, k, history[:order], last_noise)
        order = min(predictor, done + 1, *([count - k] if final else []))
        new = advance(x, k, k, history[:order], rows.noise)
        rows.set(k, new, x, rows.noise, *history[: max(predictor, corrector) - 1], draws=True)
    return rows.table()


def _sa_step(
    schedule: Schedule, tau: Array, x: Array, s: int, newest: int, history: list[Array], noise: Array
) -> Array:
    """x at s + 1 from x at s, through the predictions at newest, newest − 1, …; tau: (S,), see `_NOISY`."""
    alpha, sigma, log_snr = (values[[s, s + 1]] for values in (schedule.alpha, schedule.sigma, schedule.log_snr))
    h, square, image = log_snr[1] - log_snr[0], float(tau[s]), schedule.noise is None
    nodes = schedule.log_snr[newest - np.arange(len(history))] - log_snr[0]
    if image:
        keep, scale, rate = np.exp(-square * h) * sigma[1] / sigma[0], alpha[1], 1 + square
        deviation = sigma[1] * np.sqrt(-np.expm1(-2 * square * h))
    else:
        keep, scale, rate = alpha[1] / alpha[0], -sigma[1], -1.0
        deviation = square * sigma[1] * np.sqrt(np.expm1(2 * h))
    weights = (1 + square) * scale * _integrals(nodes, h, rate, simple=image)
    return np.asarray(keep * x + weights @ np.array(history) + deviation * noise)


def _integrals(nodes: Array, h: float, rate: float, simple: bool) -> Array:
    """∫ e^(−rate · (h − v)) ℓ_i(v) dv from 0 to h of the Lagrange polynomials ℓ_i through `nodes`.

    simple: with two nodes the integral of v itself is taken as h²/2, as UniPC does.
    """
    moments = [-np.expm1(-rate * h) / rate]
    for power in range(1, len(nodes)):
        moments.append((h**power - power * moments[-1]) / rate)
    if simple and len(nodes) == 2:
        moments[1] = h**2 / 2
    return _quadrature(nodes, np.array(moments))


def _quadrature(nodes: Array, moments: Array) -> Array:
    """The weight of each node in a sum that integrates polynomials exactly; moments: the integrals of v⁰, v¹, …"""
    if len(np.unique(nodes)) < len(nodes):
        return np.full(len(nodes), np.inf)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
