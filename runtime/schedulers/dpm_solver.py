"""DPM-Solver++, multistep, second order."""

from __future__ import annotations

import numpy as np

from ...bundle import RequestError
from .config import Config, check_range, predicted_x0, refuse, train_steps
from .euler import final_sigma, sigmas_of
from .table import Table, empty

_MEAN_MIDPOINT = ("logrho", "bh1", "bh2")
"""Solver types of other samplers, which diffusers reads as midpoint."""

_FEW_STEPS = 15
"""Below this many steps diffusers lowers the order at the end."""


def dpm_solver_pp_2m(config: Config, steps: int) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M), midpoint and Heun forms.

    Register 1 holds the x0 predicted at the step before.
    """
    refuse(
        config,
        thresholding=False,
        algorithm_type="dpmsolver++",
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        use_lu_lambdas=False,
        use_flow_sigmas=False,
        use_dynamic_shifting=False,
    )
    if config.get("lambda_min_clipped") not in (None, -np.inf, "-inf", "-Infinity"):
        raise RequestError("the scheduler option lambda_min_clipped is not supported: choose another --scheduler")
    order = config.get("solver_order", 2)
    if order not in (1, 2):
        raise RequestError(f"the scheduler option solver_order={order} is not supported, only 1 and 2")
    solver = config.get("solver_type", "midpoint")
    if solver not in ("midpoint", "heun", *_MEAN_MIDPOINT):
        raise RequestError(f"the scheduler option solver_type={solver!r} is not supported, only midpoint and heun")
    heun = solver == "heun"
    timesteps = _timesteps(config, steps)
    steps = len(timesteps)
    train = sigmas_of(config)
    sigmas = np.append(np.interp(timesteps, np.arange(len(train)), train), final_sigma(config, train))
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    sigma = sigmas * alpha
    p, q = predicted_x0(config, alpha[:-1], sigma[:-1])
    with np.errstate(divide="ignore"):
        lambdas = np.log(alpha) - np.log(sigma)
    table = empty(timesteps, 2)
    table.x0[:] = np.stack([p, q], axis=1)
    for k in range(steps):
        h = lambdas[k + 1] - lambdas[k]
        phi = -np.expm1(-h)
        old = 0.0
        if k > 0 and order == 2 and not _lower_order(config, k, steps):
            ratio = h / (lambdas[k] - lambdas[k - 1])
            old = alpha[k + 1] * ratio * ((1 - phi / h) if heun else phi / 2)
        new = alpha[k + 1] * phi + old
        table.A[k] = [[sigma[k + 1] / sigma[k] + new * p[k], -old], [p[k], 0.0]]
        table.b[k] = [new * q[k], q[k]]
    return table


def _timesteps(config: Config, steps: int) -> np.ndarray:
    total = train_steps(config, steps)
    spacing = config.get("timestep_spacing", "linspace")
    timesteps: np.ndarray
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        timesteps = np.arange(steps + 1)[::-1][:-1] * float(total // (steps + 1)) + int(config.get("steps_offset", 0))
    elif spacing == "trailing":
        timesteps = (total - np.arange(steps) * (total / steps)).round() - 1
    else:
        raise RequestError(f"the timestep spacing {spacing!r} is not supported: use linspace, leading or trailing")
    return check_range(timesteps, total)


def _lower_order(config: Config, k: int, steps: int) -> bool:
    few = config.get("lower_order_final", True) and steps < _FEW_STEPS
    zero = config.get("final_sigmas_type", "zero") == "zero"
    return k == steps - 1 and bool(config.get("euler_at_final", False) or few or zero)
