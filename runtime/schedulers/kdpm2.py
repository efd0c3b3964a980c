"""The second-order DPM solver in sigma, and the same with ancestral noise."""

from __future__ import annotations

import numpy as np

from ...common.arrays import Array
from .config import Config
from .euler import ancestral_step, first_scale, sigma_builder
from .spacing import as_float32, sigma_schedule, takes, timesteps_of, training_sigmas
from .table import Steps, Table


def kdpm2(config: Config, steps: Steps) -> Table:
    """Lu et al. 2022, "DPM-Solver", DPM-Solver-2 in the variables of Karras et al. 2022: the slope at √(σ · σ_next).

    Two calls a step; the last step, to σ = 0, is Euler's and makes one.
    """
    train, timesteps, sigmas = _schedule(config, steps)
    return _table(config, steps, train, timesteps, sigmas, sigmas[1:], None)


def kdpm2_ancestral(config: Config, steps: Steps) -> Table:
    """`kdpm2` down to σ_down and noise of deviation σ_up back up, drawn at every second call."""
    train, timesteps, sigmas = _schedule(config, steps)
    # in float32 like diffusers: σ_down is what is left of a difference that is small beside large sigmas
    down, up = ancestral_step(sigmas.astype(np.float32))
    return _table(config, steps, train, timesteps, sigmas, down.astype(np.float64), up.astype(np.float64))


def _schedule(config: Config, steps: Steps) -> tuple[Array, Array, Array]:
    takes(steps)
    config.lacks("rescale_betas_zero_snr")
    config.defaults(beta_start=0.00085, beta_end=0.012)
    config.one_of("prediction_type", "epsilon", "v_prediction")
    train = training_sigmas(config)
    timesteps, sigmas = sigma_schedule(config, steps, train)
    if config.get("use_karras_sigmas"):
        timesteps = timesteps.round()
    return train, timesteps, sigmas


def _table(
    config: Config, steps: Steps, train: Array, timesteps: Array, sigmas: Array, targets: Array, up: Array | None
) -> Table:
    """From each of `sigmas` to its target and, unless `up` is None, back up by noise of that deviation."""
    # diffusers' KDPM2 takes the middle from the far end
    ends = (sigmas[:-1], targets) if up is not None else (targets, sigmas[:-1])
    now, middles = sigmas[:-1], _between(*ends)
    calls = _interleaved(timesteps, timesteps_of(middles[:-1], train))
    seen = _interleaved(now, middles[:-1])
    rows = sigma_builder(config, calls, np.repeat(now, 2)[1:], seen, registers=2, start=2 * steps.start)
    before = rows.registers[1]
    for k in rows.calls:
        i, slope = k // 2, rows.to_d(k, seen[k])
        if k % 2 == 0:
            rows.set(k, rows.x + (middles[i] - now[i]) * slope, rows.x)
        else:
            jump = rows.zero if up is None else up[i] * rows.noise
            rows.set(k, before + (targets[i] - now[i]) * slope + jump, draws=up is not None)
    return rows.table(first_scale(config, sigmas))


def _between(first: Array, second: Array) -> Array:
    """√(first · second), the middle of their logarithms, in the float32 steps in which diffusers takes it."""
    low, high = (np.log(ends).astype(np.float32) for ends in (first, second))
    middles = as_float32(np.exp((high - (high - low) * np.float32(0.5)).astype(np.float64)))
    return np.where(first * second > 0, middles, 0.0)


def _interleaved(first: Array, second: Array) -> Array:
    """first[0], second[0], first[1], ... of which `first` holds one more."""
    both = np.empty(len(first) + len(second))
    both[::2], both[1::2] = first, second
    return both
