"""SA-Solver."""

from __future__ import annotations

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, alphas_cumprod, train_steps
from .dpm_solver import integrating, solver_schedule
from .spacing import alpha_sigma_of, quadrature, takes
from .table import Steps, Table, TableBuilder

_ORDERS = (1, 2, 3, 4)
_NOISY = 200, 800
"""The timesteps between which a step is stochastic, τ = 1; outside of them τ = 0."""


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

    def advance(x: Array, s: int, newest: int, history: list[Array], noise: Array) -> Array:
        """x at s + 1 from x at s, through the predictions at newest, newest − 1, …"""
        alpha, sigma, log_snr = (values[[s, s + 1]] for values in (schedule.alpha, schedule.sigma, schedule.log_snr))
        h, square = log_snr[1] - log_snr[0], float(tau[s])
        nodes = schedule.log_snr[newest - np.arange(len(history))] - log_snr[0]
        if image:
            keep, scale, rate = np.exp(-square * h) * sigma[1] / sigma[0], alpha[1], 1 + square
            deviation = sigma[1] * np.sqrt(-np.expm1(-2 * square * h))
        else:
            keep, scale, rate = alpha[1] / alpha[0], -sigma[1], -1.0
            deviation = square * sigma[1] * np.sqrt(np.expm1(2 * h))
        weights = (1 + square) * scale * _integrals(nodes, h, rate, simple=image)
        return np.asarray(keep * x + weights @ np.array(history) + deviation * noise)

    for k in rows.calls:
        made = k - start
        history = [schedule.predicted(rows, k), *past]
        x = rows.x
        if made:
            order = min(corrector, made + 1, *([count - k + 2] if final else []))
            x = advance(before, k - 1, k, history[:order], last_noise)
        order = min(predictor, made + 1, *([count - k] if final else []))
        new = advance(x, k, k, history[:order], rows.noise)
        rows.set(k, new, x, rows.noise, *history[: max(predictor, corrector) - 1], draws=True)
    return rows.table()


def _integrals(nodes: Array, h: float, rate: float, simple: bool) -> Array:
    """∫ e^(−rate · (h − v)) ℓ_i(v) dv from 0 to h of the Lagrange polynomials ℓ_i through `nodes`.

    simple: with two nodes the integral of v itself is taken as h²/2, as UniPC does.
    """
    moments = [-np.expm1(-rate * h) / rate]
    for power in range(1, len(nodes)):
        moments.append((h**power - power * moments[-1]) / rate)
    if simple and len(nodes) == 2:
        moments[1] = h**2 / 2
    return quadrature(nodes, np.array(moments))
