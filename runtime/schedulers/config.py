"""What a `scheduler_config.json` says, read the way diffusers reads it: betas, predictions, options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.checks import is_number
from ...common.errors import RequestError

Line = tuple[Array, Array]
"""The weights of x and of the model output m in a sum of both, (S,) each."""
_MOST_TRAINING_STEPS = 1_000_000
_LARGE = 1e30
_LONGEST = 60
_FLAGS = (
    {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"}
    | {"use_dynamic_shifting", "use_clipped_model_output", "clip_sample", "thresholding", "set_alpha_to_one"}
    | {"rescale_betas_zero_snr", "lower_order_final", "euler_at_final", "skip_prk_steps", "predict_x0"}
    | {"invert_sigmas", "stochastic_sampling"}
)
_HIGHEST_ORDER = 20
_TINY = 1e-12
_WHOLE: dict[str, tuple[float, float]] = {
    "steps_offset": (-_MOST_TRAINING_STEPS, _MOST_TRAINING_STEPS),
    **dict.fromkeys(("num_train_timesteps", "original_inference_steps"), (1, _MOST_TRAINING_STEPS)),
    **dict.fromkeys(("solver_order", "order", "predictor_order", "corrector_order"), (1, _HIGHEST_ORDER)),
}
"""Options that are whole numbers, and what they may be."""
_RANGES = _WHOLE | {
    "rho": (0.1, 1000.0),
    "mu": (-50.0, 50.0),
    **dict.fromkeys(("beta_start", "beta_end", "eta"), (0.0, 1.0)),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "clip_sample_range"), (_TINY, _LARGE)),
    **dict.fromkeys(("flow_shift", "timestep_scaling"), (_TINY, _LARGE)),
    **dict.fromkeys(("shift", "s_tmin", "s_tmax"), (0.0, _LARGE)),
    **dict.fromkeys(("s_churn", "s_noise"), (0.0, 1e6)),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), (1, _MOST_TRAINING_STEPS)),
    **dict.fromkeys(("base_shift", "max_shift"), (-50.0, 50.0)),
}
"""Options that are numbers, whole ones among them, and what they may be."""


class Config:
    """The options of a scheduler, and which of them were read, so that none is ignored silently."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Raises `RequestError` naming an option whose value is not of its kind."""
        for name, value in values.items():
            _check(name, value)
        self._values = values
        self.read: set[str] = set()
        self._lacking: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The option `name`; an explicit null is None, an absent option is `default`."""
        if name in self._lacking:
            return default
        self.read.add(name)
        return self._values.get(name, default)

    def one_of(self, name: str, *choices: Any) -> Any:
        """The option `name`, the first of `choices` when absent. Raises `RequestError` when it is none of them."""
        value = self.get(name, choices[0])
        if value in choices:
            return choices[choices.index(value)]
        known = ", ".join(map(str, dict.fromkeys(choices)))
        raise RequestError(f"the scheduler option {name}={short(value)} is not supported: use one of {known}")

    def defaults(self, **values: Any) -> None:
        """Let absent options be `values`, for a sampler whose class has other defaults than most."""
        self._values = {**values, **self._values}

    def lacks(self, *names: str) -> None:
        """Forget the options `names`, which a config may hold for another class and this sampler ignores."""
        self._lacking.update(names)

    def unheeded(self, *names: str) -> None:
        """Take the options `names` as not read: what was made of them changes nothing with the others."""
        self.read.difference_update(names)

    def refuse(self, **neutral: Any) -> None:
        """Raise `RequestError` for each option that differs from the only value supported."""
        for name, value in neutral.items():
            found = self.get(name)
            if found is not None and found != value:
                raise RequestError(
                    f"the scheduler option {name}={short(found)} is not supported, only {value!r}: "
                    "choose another --scheduler"
                )


def _check(name: str, value: Any) -> None:
    if value is None:
        return
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise RequestError(f"the scheduler option {name} must be true or false, found {short(value)}")
    elif name in _RANGES:
        low, high = _RANGES[name]
        # compared before it is converted: an integer may be beyond float64
        if not is_number(value) or not low <= value <= high or (name in _WHOLE and value != int(value)):
            kind = "a whole number" if name in _WHOLE else "a number"
            raise RequestError(
                f"the scheduler option {name} must be {kind} from {low:g} to {high:g}, found {short(value)}"
            )


def short(value: Any) -> str:
    """`value` as it is shown in a message: on one line of at most some 60 characters."""
    if isinstance(value, int) and abs(value) >= _LARGE:
        return f"{_LARGE:g} or more" if value > 0 else f"-{_LARGE:g} or less"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # it holds an integer of too many digits, or too many lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""The options of the noise that a model was trained with."""


def alphas_cumprod(config: Config, *more: str) -> Array:
    """ᾱ_t for each training timestep (DDPM, equation 4), float64 values of diffusers' float32 arithmetic.

    more: the beta schedules that a sampler takes beside the three that all take.
    """
    steps = train_steps(config)
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    schedule = config.one_of("beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2", *more)
    betas: Array
    if config.get("trained_betas") is not None:
        betas = np.asarray(config.get("trained_betas"), np.float32)
        if betas.shape != (steps,):
            raise RequestError(f"trained_betas must hold num_train_timesteps={steps} values, found {betas.size}")
    elif schedule == "linear":
        betas = linspace32(start, end, steps)
    elif schedule == "scaled_linear":
        betas = linspace32(start**0.5, end**0.5, steps) ** 2
    elif schedule == "sigmoid":
        betas = (1 / (1 + np.exp(-linspace32(-6, 6, steps)))) * np.float32(end - start) + np.float32(start)
    else:
        bar = _BARS[schedule]
        betas = np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)], np.float32)
    if config.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    return _cumprod(np.float32(1) - betas).astype(np.float64)


def linspace32(start: float, end: float, steps: int) -> Array:
    """`torch.linspace` in float32: from both ends towards the middle, each product and sum rounded once."""
    step = float((np.float32(end) - np.float32(start)) / np.float32(max(steps - 1, 1)))
    index = np.arange(steps)
    low, high = float(np.float32(start)) + step * index, float(np.float32(end)) - step * (steps - 1 - index)
    return np.asarray(np.where(index < steps // 2, low, high) if steps > 1 else [start], np.float32)


def _cumprod(alphas: Array) -> Array:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _cosine(t: float) -> float:
    """Nichol & Dhariwal 2021, equation 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """Hang et al. 2024, "Improved Noise Schedule for Diffusion Training", with μ = 0 and b = 1/2."""
    log_snr = -0.5 * math.copysign(math.log(1 - 2 * abs(0.5 - t) + 1e-6), t - 0.5)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


_BARS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": lambda t: math.exp(-12 * t),
}
"""ᾱ(t) for t from 0 to 1; "exp" is the one of EDM's Heun."""


def _zero_terminal_snr(betas: Array) -> Array:
    """Lin et al. 2023, algorithm 1."""
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    return (np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])).astype(np.float32)


def train_steps(config: Config) -> int:
    """The number of training timesteps."""
    total = config.get("num_train_timesteps", 1000)
    if total is None:
        raise RequestError(f"num_train_timesteps must be between 1 and {_MOST_TRAINING_STEPS}, found None")
    return int(total)


def predictions(config: Config, alpha: Array, sigma: Array, *more: str) -> tuple[Line, Line]:
    """x0 = p·x + q·m and noise = u·x + v·m for x = alpha·image + sigma·noise, by what the model predicts.

    more: the predictions that a sampler takes beside the three that all take.
    """
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    prediction = config.one_of("prediction_type", "epsilon", "sample", "v_prediction", *more)
    if prediction == "epsilon":
        return (1 / alpha, -sigma / alpha), (zero, one)
    if prediction == "sample":
        return (zero, one), (1 / sigma, -alpha / sigma)
    if prediction == "v_prediction":
        return (alpha, -sigma), (sigma, alpha)
    return (one, -sigma), (one, alpha)


def clip_range(config: Config, default: bool) -> float:
    """±range that the predicted x0 is clamped to, infinity when it is not."""
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", default) else math.inf
