"""What a `scheduler_config.json` says, read the way diffusers reads it: betas, spacings, options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...bundle import RequestError
from ...engines import Array

Config = Mapping[str, Any]
_MOST_TRAINING_STEPS = 1_000_000


def refuse(config: Config, **neutral: Any) -> None:
    """Raise `RequestError` for each option in `config` that differs from the only value supported."""
    for name, value in neutral.items():
        found = config.get(name)
        if found is not None and found != value:
            raise RequestError(
                f"the scheduler option {name}={found!r} is not supported, only {value!r}: choose another --scheduler"
            )


def alphas_cumprod(config: Config) -> Array:
    """ᾱ_t for each training timestep (DDPM, equation 4), float64 values of diffusers' float32 arithmetic."""
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
        if betas.shape != (steps,):
            raise RequestError(f"trained_betas must hold num_train_timesteps={steps} values, found {betas.size}")
    elif schedule == "linear":
        betas = _linspace(start, end, steps)
    elif schedule == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, steps) ** 2
    elif schedule == "squaredcos_cap_v2":
        betas = _cosine(steps)
    else:
        raise RequestError(
            f"the beta schedule {schedule!r} is not supported: use linear, scaled_linear or squaredcos_cap_v2"
        )
    if config.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    return _cumprod(np.float32(1) - betas).astype(np.float64)


def _linspace(start: float, end: float, steps: int) -> Array:
    """`torch.linspace` in float32, which counts from both ends towards the middle."""
    step = (np.float32(end) - np.float32(start)) / np.float32(max(steps - 1, 1))
    index = np.arange(steps)
    low = np.float32(start) + step * index.astype(np.float32)
    high = np.float32(end) - step * (steps - 1 - index).astype(np.float32)
    return np.where(index < steps // 2, low, high).astype(np.float32)


def _cumprod(alphas: Array) -> Array:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _cosine(steps: int) -> Array:
    """Nichol & Dhariwal 2021, equation 17."""

    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)], np.float32)


def _zero_terminal_snr(betas: Array) -> Array:
    """Lin et al. 2023, algorithm 1."""
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    return (np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])).astype(np.float32)


def train_steps(config: Config, steps: int) -> int:
    """The number of training timesteps. Raises `RequestError` when more `steps` than that are asked for."""
    total = int(config.get("num_train_timesteps", 1000))
    if not 1 <= total <= _MOST_TRAINING_STEPS:
        raise RequestError(f"num_train_timesteps must be between 1 and {_MOST_TRAINING_STEPS}, found {total}")
    if not 1 <= steps <= total:
        raise RequestError(f"steps must be between 1 and {total}, found {steps}")
    return total


def spaced_timesteps(config: Config, steps: int, default: str) -> Array:
    """Descending float64 timesteps (Lin et al. 2023, table 2); linspace values are not yet rounded."""
    total = train_steps(config, steps)
    spacing = config.get("timestep_spacing", default)
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps)[::-1] * float(total // steps) + int(config.get("steps_offset", 0))
    if spacing == "trailing":
        return np.round(total - np.arange(steps) * (total / steps)) - 1
    raise RequestError(f"the timestep spacing {spacing!r} is not supported: use linspace, leading or trailing")


def check_range(timesteps: Array, total: int) -> Array:
    """`timesteps` as they are. Raises `RequestError` when steps_offset pushed one out of the training range."""
    if len(timesteps) and timesteps.min() < 0:
        raise RequestError(
            f"timestep {timesteps.min():.0f} is negative: mend steps_offset in the scheduler configuration"
        )
    if len(timesteps) and timesteps.max() >= total:
        raise RequestError(
            f"timestep {timesteps.max():.0f} is past the {total} that the model was trained with: ask for fewer steps"
        )
    return timesteps


def predicted_x0(config: Config, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """x0 = p·x + q·m for x = alpha·x0 + sigma·noise, by what the model predicts (epsilon, sample or v)."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "epsilon":
        with np.errstate(divide="ignore"):
            p, q = 1 / alpha, -sigma / alpha
        if not np.isfinite(p).all():
            raise RequestError(
                "the schedule starts at pure noise, where predicted noise says nothing: use v_prediction"
            )
        return p, q
    if prediction == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v_prediction":
        return alpha, -sigma
    raise RequestError(f"prediction type {prediction!r} is not supported: use epsilon, sample or v_prediction")


def clip_range(config: Config, default: bool) -> float:
    """±range that the predicted x0 is clamped to, infinity when it is not."""
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", default) else math.inf
