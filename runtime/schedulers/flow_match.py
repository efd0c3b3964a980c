"""Flow matching: x = (1 − σ) · image + σ · noise, of which the model predicts the velocity dx/dσ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, train_steps
from .karras import churned
from .spacing import as_float32, count_of, curve
from .table import Steps, Table, TableBuilder


def flow_euler(config: Config, steps: Steps) -> Table:
    """Euler steps down the velocity (Lipman et al. 2023, "Flow Matching for Generative Modeling", equation 1)."""
    timesteps, sigmas = _schedule(config, steps)
    if config.get("stochastic_sampling", False):
        return _renoised(timesteps, sigmas, steps.start)
    rows = TableBuilder(timesteps, 1 - sigmas[:-1], sigmas[:-1], start=steps.start)
    for k in rows.calls:
        rows.set(k, rows.x + (sigmas[k + 1] - sigmas[k]) * rows.m)
    return rows.table()


def flow_lcm(config: Config, steps: Steps) -> Table:
    """Predict the image, noise it to the next σ: multistep consistency sampling (Luo et al. 2023, algorithm 3)."""
    if config.get("scale_factors") and config.get("upscale_mode", "bicubic"):
        raise RequestError(
            "the scheduler option scale_factors is not supported: latents keep their size; choose another --scheduler"
        )
    timesteps, sigmas = _schedule(config, steps)
    return _renoised(timesteps, sigmas, steps.start)


def _renoised(timesteps: Array, sigmas: Array, start: int) -> Table:
    rows = TableBuilder(timesteps, 1 - sigmas[:-1], sigmas[:-1], start=start)
    for k in rows.calls:
        image = rows.x - sigmas[k] * rows.m
        rows.set(k, (1 - sigmas[k + 1]) * image + sigmas[k + 1] * rows.noise, draws=True)
    return rows.table()


def flow_heun(config: Config, steps: Steps) -> Table:
    """Karras et al. 2022, algorithm 2, on the velocity: Heun's second order in two calls a step, Euler for the last.

    s_churn, s_tmin, s_tmax and s_noise are the algorithm's. Noise is drawn in both calls and used in the first.
    """
    if steps.mu is not None:
        raise RequestError(
            "flow-heun knows no shift that follows the size, as this schedule has: choose flow-euler or dpm++2m"
        )
    if steps.timesteps is not None or steps.sigmas is not None:
        raise RequestError("flow-heun takes no timesteps or sigmas: ask for a number of --steps, or for flow-euler")
    shift = float(config.get("shift", 1.0))
    sigmas = np.append(as_float32(shifted(_even(config, steps, shift), shift)), 0.0)
    hat, deviation = churned(config, sigmas[:-1], 2 * steps.count - 1)
    called = np.append(sigmas[:1], np.repeat(sigmas[1:-1], 2))
    rows = TableBuilder(_timesteps(config, called), 1 - called, called, registers=2, start=2 * steps.start)
    for k in range(steps.start, steps.count):
        slope, step = sigmas[k] / hat[k] * rows.m, sigmas[k + 1] - hat[k]
        x, noisy = rows.x + deviation[k] * rows.noise, bool(hat[k] > sigmas[k])
        rows.set(2 * k, x + step * slope, x + step / 2 * slope, draws=noisy)
        if k < steps.count - 1:
            rows.set(2 * k + 1, rows.registers[1] + step / 2 * rows.m, draws=noisy)
    return rows.table()


def _timesteps(config: Config, sigmas: Array) -> Array:
    return as_float32(sigmas.astype(np.float32) * np.float32(train_steps(config)))


def _schedule(config: Config, steps: Steps) -> tuple[Array, Array]:
    """Timesteps and the sigmas from each to the next, float64 values of float32 precision.

    The model is given the timesteps that were asked for as they are; only their sigmas are shifted.
    """
    dynamic = config.get("use_dynamic_shifting", False)
    shift = 1.0 if dynamic else float(config.get("shift", 1.0))
    config.one_of("time_shift_type", "exponential", "linear")  # a wrong one is refused where it has no effect too
    # what was asked for is shifted in float32, as diffusers does
    if steps.sigmas is not None:
        if steps.timesteps is not None and len(steps.timesteps) != len(steps.sigmas):
            raise RequestError(f"{len(steps.timesteps)} timesteps and {len(steps.sigmas)} sigmas: give as many of both")
        sigmas = np.asarray(within("sigmas", steps.sigmas, 1), np.float32)
    elif steps.timesteps is not None:
        sigmas = np.asarray(steps.timesteps, np.float32) / np.float32(train_steps(config))
    else:
        sigmas = _even(config, steps, 1.0 if dynamic else shift)
    if steps.timesteps is not None:
        within("timesteps", steps.timesteps, train_steps(config))
    sigmas = time_shifted(config, sigmas, steps.mu, "shift")
    curved = curve(config, sigmas[[0, -1]], len(sigmas))
    if curved is not None and sigmas[0] < sigmas[-1]:
        raise RequestError("a sigma curve goes down: ask for sigmas or timesteps that descend")
    sigmas = as_float32(sigmas if curved is None else curved)
    if not np.isfinite(sigmas).all():
        raise RequestError("these options give no schedule: mend shift, mu, shift_terminal or the sigmas asked for")
    timesteps = _timesteps(config, sigmas) if steps.timesteps is None else as_float32(np.asarray(steps.timesteps))
    if config.get("invert_sigmas", False):
        sigmas = as_float32(1 - sigmas)
        return _timesteps(config, sigmas), np.append(sigmas, 1.0)
    return timesteps, np.append(sigmas, 0.0)


def within(name: str, asked: Sequence[float], most: float) -> Sequence[float]:
    """`asked`. Raises `RequestError` for one that is not from 0, which is the image, to `most`, which is noise."""
    beyond = [value for value in asked if not 0 <= value <= most]
    if beyond:
        raise RequestError(f"{name} of flow matching must be from 0 to {most:g}, found {beyond[0]:g}")
    return asked


def _even(config: Config, steps: Steps, shift: float) -> Array:
    """Even sigmas between the ends of the training schedule, which are shifted already."""
    scale, count = train_steps(config), count_of(config, steps)
    high, low = shifted(np.array([scale, 1], np.float32) / np.float32(scale), shift)
    return np.asarray(np.linspace(float(high) * scale, float(low) * scale, count) / scale)


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """The mu of a picture of so many tokens: on the line through the shifts of the smallest and the largest.

    Raises `RequestError` for options that are no numbers.
    """
    read = Config({name: config[name] for name in SHIFT if name in config})
    given = {name: read.get(name) for name in SHIFT}
    low, high, base, most = (float(SHIFT[name] if value is None else value) for name, value in given.items())
    if low == high:
        raise RequestError("base_image_seq_len and max_image_seq_len must differ: mend the scheduler options")
    slope = (most - base) / (high - low)
    return tokens * slope + (base - slope * low)


SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""Options of a schedule that shifts with the size, and what they are by default; diffusers' values for FLUX."""


def shifted(sigmas: Array, shift: float) -> Array:
    """Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", equation 23."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def time_shifted(config: Config, sigmas: Array, mu: float | None, option: str) -> Array:
    """The same by the option of that name, or by e^mu or mu; then stretched to end at `shift_terminal`."""
    if config.get("use_dynamic_shifting", False):
        config.get("mu")  # which is heeded
        if mu is None:
            raise RequestError(
                "this schedule shifts with the size of the image: set mu, or use_dynamic_shifting to false"
            )
        if config.one_of("time_shift_type", "exponential", "linear") == "exponential":
            mu = float(np.exp(mu))
        sigmas = np.asarray(mu / (mu + (1 / sigmas - 1)))
    else:
        sigmas = shifted(sigmas, float(config.get(option, 1.0)))
    terminal, rest = config.get("shift_terminal"), 1 - sigmas
    if not terminal:
        return sigmas
    if rest[-1] == 0:
        raise RequestError("shift_terminal needs a schedule that leaves pure noise: ask for two steps or more")
    return np.asarray(1 - rest / (rest[-1] / (1 - terminal)))
