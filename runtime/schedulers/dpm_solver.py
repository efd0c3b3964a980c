"""DPM-Solver, DPM-Solver++ and DEIS: polynomials in λ = log(α/σ), integrated exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import BETAS, Config, Line, predictions
from .flow_match import shifted
from .spacing import (
    CURVES,
    as_float32,
    at_timesteps,
    count_of,
    curve,
    custom_timesteps,
    even_timesteps,
    final_sigma,
    takes,
    timesteps_of,
    training_sigmas,
)
from .table import Steps, Table, TableBuilder

_Point = tuple[int, Array]
"""A time and what is integrated there."""
_FEW_STEPS = 15
"""Below this many steps `lower_order_final` lowers the order of the last two."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """timesteps: (S,). alpha, sigma, log_snr: (S + 1,), the last after all steps. x0: see `predictions`.

    noise: likewise, for a solver that integrates the predicted noise; None for one that integrates x0.
    """

    timesteps: Array
    alpha: Array
    sigma: Array
    x0: Line
    noise: Line | None = None
    log_snr: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_snr", np.log(self.alpha) - np.log(self.sigma))

    def builder(self, registers: int, start: int) -> TableBuilder:
        """An empty table of this schedule."""
        return TableBuilder(self.timesteps, self.alpha[:-1], self.sigma[:-1], self.x0, registers, start=start)

    def predicted(self, rows: TableBuilder, k: int) -> Array:
        """What the solver integrates, at row k."""
        x0 = rows.predicted(k)
        return x0 if self.noise is None else self.noise[0][k] * rows.x + self.noise[1][k] * rows.m

    def repeats(self, s: int, t: int) -> bool:
        """Whether two noise levels are one in float32, in which diffusers has them."""
        return bool(np.float32(self.log_snr[s]) == np.float32(self.log_snr[t]))

    def of_noise(self, config: Config) -> Schedule:
        """The same for a solver that integrates the predicted noise."""
        return replace(self, noise=predictions(config, self.alpha[:-1], self.sigma[:-1])[1])

    def advance(
        self, rows: TableBuilder, algorithm: str, x: Array, t: int, *points: _Point, midpoint: bool, bend: float
    ) -> Array:
        """x at time t from x at time s, with the polynomial in λ through one to three points, the first at s.

        dpmsolver++: f predicts the image (Lu et al. 2022, "DPM-Solver++", equation 8). dpmsolver: f predicts the noise
        (Lu et al. 2022, "DPM-Solver", equation 3.4). sde-dpmsolver++, sde-dpmsolver: their SDEs ("DPM-Solver++",
        appendix). midpoint: whether f′ of two points is weighted by that rule. bend: how much of f″ is taken.
        """
        (s, f), *others = points
        alpha, sigma, log_snr = self.alpha, self.sigma, self.log_snr
        h = log_snr[t] - log_snr[s]
        stochastic = algorithm.startswith("sde")
        if algorithm.endswith("++"):
            rate = 2.0 if stochastic else 1.0
            keep = sigma[t] / sigma[s] * (np.exp(-h) if stochastic else 1.0)
            scale, variance = alpha[t], -np.expm1(-2 * h)
        else:
            rate, keep = -1.0, alpha[t] / alpha[s]
            scale, variance = sigma[t] * (2.0 if stochastic else 1.0), np.expm1(2 * h)
        phi = -np.expm1(-rate * h)
        new = np.asarray(keep * x + scale * phi * f)
        if stochastic:
            new = new + sigma[t] * np.sqrt(max(variance, 0.0) if self.repeats(s, t) else variance) * rows.noise
        chords = [(g - f) / (log_snr[other] - log_snr[s]) for other, g in others]
        slope = scale * (h - phi / rate)
        if len(chords) == 1:
            new = new + (scale * phi * h / 2 if midpoint else slope) * chords[0]
        elif len(chords) == 2:
            (near, _), (far, _) = others
            half = (chords[0] - chords[1]) / (log_snr[near] - log_snr[far])
            # the SDE's quadratic term has its sign turned in diffusers
            quadratic = scale * h**2 / 2 * (-1 if stochastic else 1) - slope / rate
            new = new + slope * (chords[0] - (log_snr[near] - log_snr[s]) * half) + bend * quadratic * 2 * half
        return new


def dpm_multistep(config: Config, steps: Steps) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M) and its kin, of order 1 to 3."""
    takes(steps, "timesteps", "mu")
    rounds = config.get("beta_schedule") != "squaredcos_cap_v2"
    algorithm, schedule = _algorithm(config, steps, rounds, "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    euler_last = bool(config.get("euler_at_final", False)) or schedule.sigma[-1] == 0
    third = algorithm != "sde-dpmsolver"
    return multistep(config, steps, schedule, algorithm, midpoint_or_heun(config), euler_last, third)


def deis(config: Config, steps: Steps) -> Table:
    """Zhang & Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator", ρAB-DEIS in log ρ = −λ."""
    config.lacks("rescale_betas_zero_snr", "lambda_min_clipped", "use_lu_lambdas", "final_sigmas_type", "variance_type")
    takes(steps, "mu")
    config.one_of("algorithm_type", "deis", "dpmsolver", "dpmsolver++")
    config.one_of("solver_type", "logrho", "midpoint", "heun", "bh1", "bh2")
    schedule = solver_schedule(config, steps, rounds=True, repeats=True)
    alpha, sigma = schedule.alpha[:-1], schedule.sigma[:-1]
    if config.get("prediction_type") == "flow_prediction" and not config.get("use_flow_sigmas"):
        sigma = sigma / alpha
    p, q = schedule.x0
    schedule = replace(schedule, noise=((1 - alpha * p) / sigma, -alpha * q / sigma))
    return multistep(config, steps, schedule, "dpmsolver", "logrho", euler_last=False, third=True)


def multistep(
    config: Config, steps: Steps, schedule: Schedule, algorithm: str, solver_type: str, euler_last: bool, third: bool
) -> Table:
    """A polynomial through the newest predictions. Registers: x, then the predictions before, newest first.

    euler_last: the last step is of first order. third: whether diffusers has a third order here.
    """
    highest = config.one_of("solver_order", 2, 1, 3)
    count = len(schedule.timesteps)
    midpoint = solver_type == "midpoint"
    few = bool(config.get("lower_order_final", True)) and count < _FEW_STEPS
    rows = schedule.builder(highest, steps.start)
    for k in rows.calls:
        order = min(highest, k - steps.start + 1, count - k if few else highest)
        if euler_last and k == count - 1:
            order = 1
        history = (schedule.predicted(rows, k), *rows.registers[1:])
        points = [(k - i, history[i]) for i in range(order)]
        if order == 3 and not third:
            raise RequestError(f"algorithm_type={algorithm} has no third order here: set solver_order to 2")
        divides = solver_type != "logrho" and (order == 3 or (order == 2 and solver_type == "heun"))
        if divides and schedule.repeats(k, k + 1):
            raise RequestError(
                f"two noise levels of the schedule are equal, where order {order} divides by zero: set euler_at_final, "
                "or final_sigmas_type to zero"
            )
        # DPM-Solver's own code halves the second derivative
        bend = 1 if solver_type == "logrho" else 1 / 2
        new = schedule.advance(rows, algorithm, rows.x, k + 1, *points, midpoint=midpoint, bend=bend)
        rows.set(k, new, *history[: highest - 1], draws=algorithm.startswith("sde"))
    return rows.table()


def dpm_singlestep(config: Config, steps: Steps) -> Table:
    """Lu et al. 2022, "DPM-Solver++", algorithm 1 (2S), and "DPM-Solver", algorithm 2 (3S), a row for each model call.

    Registers: x, the x that the block of calls began with, then the predictions before, newest first.
    """
    takes(steps, "timesteps", "mu")
    config.lacks("rescale_betas_zero_snr", "timestep_spacing", "use_lu_lambdas")
    algorithm, schedule = _algorithm(config, steps, True, "dpmsolver", "sde-dpmsolver++")
    midpoint = midpoint_or_heun(config) == "midpoint"
    highest = config.one_of("solver_order", 2, 1, 3)
    count = len(schedule.timesteps)
    orders = [1 + k % highest for k in range(count)]
    if schedule.sigma[-1] == 0 or (config.get("lower_order_final", False) and count % highest == 0):
        orders[-1] = 1
    registers = 1 if highest == 1 else highest + 1
    rows = schedule.builder(registers, steps.start)
    for k in rows.calls:
        order = min(orders[k], k - steps.start + 1)
        base = rows.x if order == 1 else rows.registers[1]
        history = (schedule.predicted(rows, k), *rows.registers[2:])
        points = [(k - i, history[i]) for i in reversed(range(order))]
        if midpoint and order == 3:
            points.pop(1)
        new = schedule.advance(rows, algorithm, base, k + 1, *points, midpoint=midpoint and order == 2, bend=1)
        rows.set(k, *(new, base, *history)[:registers], draws=algorithm.startswith("sde"))
    return rows.table()


def _algorithm(config: Config, steps: Steps, rounds: bool, *more: str) -> tuple[str, Schedule]:
    """The algorithm, dpmsolver++ or one of `more`, and the schedule of what it integrates."""
    algorithm = str(config.one_of("algorithm_type", "dpmsolver++", *more, "deis"))
    if not algorithm.endswith("++") and config.get("final_sigmas_type", "zero") == "zero":
        raise RequestError(f"algorithm_type={algorithm} cannot end at sigma 0: set final_sigmas_type to sigma_min")
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm
    schedule = solver_schedule(config, steps, rounds)
    if algorithm.endswith("++"):
        return algorithm, schedule
    if config.get("prediction_type") == "flow_prediction":
        raise RequestError(f"algorithm_type={algorithm} takes no flow_prediction: set algorithm_type to dpmsolver++")
    return algorithm, schedule.of_noise(config)


def midpoint_or_heun(config: Config) -> str:
    """midpoint or heun; the solver types of other samplers are read as midpoint."""
    return "heun" if config.one_of("solver_type", "midpoint", "heun", "logrho", "bh1", "bh2") == "heun" else "midpoint"


def solver_schedule(config: Config, steps: Steps, rounds: bool, repeats: bool = False) -> Schedule:
    """rounds: whole timesteps on a Karras or Lu curve are the nearest, not the next lower ones.

    repeats: after a curve's last sigma comes the same again, and no `final_sigmas_type` says otherwise.
    """
    config.refuse(thresholding=False)
    if config.get("variance_type") in ("learned", "learned_range"):
        raise RequestError("variance_type=learned is not supported: the model must predict the mean alone")
    train, shift = training_sigmas(config), _flow_shift(config, steps)

    def flow_sigmas() -> Array:
        return shifted(1 - np.linspace(1, 1 / len(train), steps.count + 1), shift)[:0:-1]

    timesteps, sigmas, curved = spaced(config, steps, train, rounds, flow_sigmas)
    last = (sigmas[-1] if curved else train[0]) if repeats else final_sigma(config, train)
    of_training = any(map(config.get, (*CURVES, "use_lu_lambdas"))) or (not repeats and last)
    if config.get("use_flow_sigmas", False) and not of_training:
        config.unheeded(*BETAS)
    return schedule_of(config, steps, timesteps, as_float32(np.append(sigmas, last)))


def schedule_of(config: Config, steps: Steps, timesteps: Array, sigmas: Array) -> Schedule:
    """The schedule over `timesteps` with `sigmas`, (S + 1,): ratios σ/α, or with `use_flow_sigmas` σ = 1 − α itself."""
    if steps.start >= len(timesteps):
        raise RequestError(f"the first step must be between 0 and {len(timesteps) - 1}, found {steps.start}")
    if config.get("use_flow_sigmas", False):
        alpha, sigma = 1 - sigmas, sigmas
    else:
        alpha = 1 / np.sqrt(sigmas**2 + 1)
        sigma = sigmas * alpha
    flow = config.get("prediction_type") == "flow_prediction"
    x0, _ = predictions(config, alpha[:-1], (sigmas if flow else sigma)[:-1], "flow_prediction")
    return Schedule(timesteps, alpha, sigma, x0)


def integrating(config: Config, schedule: Schedule, image: bool) -> Schedule:
    """`schedule` of a solver that integrates the predicted image, else the predicted noise."""
    if (schedule.alpha <= 0).any():
        raise RequestError("use_flow_sigmas needs sigmas below 1: set no other sigma curve, or a smaller sigma_max")
    if config.get("prediction_type") == "flow_prediction" and not image:
        raise RequestError("flow_prediction predicts the image only: set predict_x0, or algorithm_type=data_prediction")
    return schedule if image else schedule.of_noise(config)


def spaced(
    config: Config, steps: Steps, train: Array, rounds: bool, flow_sigmas: Callable[[], Array]
) -> tuple[Array, Array, bool]:
    """The whole timesteps, their sigmas, and whether the sigmas came first.

    flow_sigmas: makes those of `use_flow_sigmas` where no sigma curve is asked for.
    """
    flow = config.get("use_flow_sigmas", False)
    timesteps = custom_timesteps(config, steps)
    if timesteps is not None and not flow:
        timesteps = np.trunc(timesteps)
        return timesteps, at_timesteps(timesteps, train), False
    if timesteps is not None:
        raise RequestError("timesteps cannot be chosen with use_flow_sigmas: the sigmas choose them")
    count = count_of(config, steps)
    sigmas, nearest = curve(config, train[::-1], count), bool(config.get("use_karras_sigmas"))
    if config.get("use_lu_lambdas") and not nearest:
        # Lu et al. 2022, "DPM-Solver", section 3.3: even steps of λ
        ends = np.log(train.astype(np.float32)).astype(np.float64)
        sigmas, nearest = np.exp(np.linspace(ends[-1], ends[0], count)), True
    if sigmas is not None:
        timesteps = timesteps_of(sigmas, train)
        return np.trunc(timesteps.round() if rounds and nearest else timesteps), sigmas, True
    if flow:
        sigmas = flow_sigmas()
        return np.trunc(sigmas * len(train)), sigmas, True
    # one past the last timestep whose λ = −log σ is at least this, searched as diffusers does
    lowest = config.get("lambda_min_clipped")
    last = None if lowest is None else len(train) - int(np.searchsorted(-np.log(train[::-1]), float(lowest)))
    timesteps = even_timesteps(config, count, "linspace", last, more=1).round()
    return timesteps, at_timesteps(timesteps, train), False


def _flow_shift(config: Config, steps: Steps) -> float:
    kind = config.get("time_shift_type", "exponential") if config.get("use_dynamic_shifting", False) else ""
    if steps.mu is None:
        return float(config.get("flow_shift", 1.0))
    if kind != "exponential":
        raise RequestError("mu needs use_dynamic_shifting and time_shift_type=exponential: set them, or give no mu")
    config.get("mu")  # which is heeded
    return float(np.exp(steps.mu))
