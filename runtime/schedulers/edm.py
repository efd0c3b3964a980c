"""Euler and DPM-Solver++ for models in the EDM formulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, Line, linspace32
from .dpm_solver import Schedule, midpoint_or_heun, multistep
from .karras import c_in, churned, churned_euler
from .spacing import as_float32, count_of, takes
from .table import Steps, Table, TableBuilder


def edm_euler(config: Config, steps: Steps) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2, order 1.

    The model sees x before the churn, as one call a step allows.
    """
    takes(steps)
    high, _, data = _constants(config)
    sigmas = _sigmas(config, np.linspace(0, 1, count_of(config, steps)))
    final = 0.0 if config.one_of("final_sigmas_type", "zero", "sigma_min") == "zero" else sigmas[-1]
    sigmas, now = np.append(sigmas, final), sigmas
    churn = churned(config, now)
    p, q = x0 = _x0(config, churn[0])
    rows = TableBuilder(0.25 * np.log(now), 1.0, now, x0, start=steps.start, input_scale=c_in(now, data))
    churned_euler(rows, sigmas, churn, p)
    return rows.table(np.hypot(high, 1))


def edm_dpm_solver(config: Config, steps: Steps) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M) and its kin, of order 1 to 3, on x = image + σ · noise."""
    takes(steps)
    config.refuse(thresholding=False)
    algorithm = config.one_of("algorithm_type", "dpmsolver++", "sde-dpmsolver++", "deis")
    to_zero = config.one_of("final_sigmas_type", "zero", "sigma_min") == "zero"
    if algorithm == "deis" and to_zero:
        raise RequestError("algorithm_type=deis cannot end at sigma 0: set final_sigmas_type to sigma_min")
    high, low, data = _constants(config)
    sigmas = _sigmas(config, linspace32(0, 1, count_of(config, steps)))
    sigmas = as_float32(np.append(sigmas, 0.0 if to_zero else low))
    now = sigmas[:-1]
    schedule = Schedule(0.25 * np.log(now), np.ones_like(sigmas), sigmas, _x0(config, now))
    euler_last = to_zero or bool(config.get("euler_at_final", False))
    third = algorithm != "sde-dpmsolver++"
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm
    table = multistep(config, steps, schedule, algorithm, midpoint_or_heun(config), euler_last, third)
    return replace(table, input_scale=c_in(now, data)[steps.start :], init_scale=float(np.hypot(high, 1)))


def _sigmas(config: Config, ramp: Array) -> Array:
    """Sigmas from sigma_max to sigma_min along a ramp from 0 to 1, in its precision and rounded to float32."""
    high, low, _ = _constants(config)
    rho = float(config.get("rho", 7.0))
    if config.one_of("sigma_schedule", "karras", "exponential") == "exponential":
        return as_float32(np.exp(linspace32(np.log(low), np.log(high), len(ramp)).astype(np.float64))[::-1])
    high, low = high ** (1 / rho), low ** (1 / rho)
    return as_float32((high + ramp * (low - high)).astype(np.float64) ** rho)


def _constants(config: Config) -> tuple[float, float, float]:
    """σ_max, σ_min and σ_data."""
    return (
        float(config.get("sigma_max", 80.0)),
        float(config.get("sigma_min", 0.002)),
        float(config.get("sigma_data", 0.5)),
    )


def _x0(config: Config, sigmas: Array) -> Line:
    """x0 = p·x + q·m: c_skip and c_out of Karras et al. 2022, table 1."""
    *_, data = _constants(config)
    sign = 1 if config.one_of("prediction_type", "epsilon", "v_prediction") == "epsilon" else -1
    return data**2 / (sigmas**2 + data**2), sign * sigmas * data / np.sqrt(sigmas**2 + data**2)
