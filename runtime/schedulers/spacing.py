"""Which timesteps and sigmas a schedule has: the spacings of Lin et al. 2023 and the sigma curves."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from .config import Config, alphas_cumprod, short, train_steps
from .table import Steps

_SMALLEST_BAR = 2.0**-24
"""ᾱ at the last timestep of a zero-terminal-SNR schedule, so that sigma stays finite; diffusers' value."""
_RHO = 7.0
_BETA = 0.6
_BETA_TERMS, _HALVINGS = 60, 60
"""That many terms of the series at 1/2, and halvings of an interval, reach the precision of float64."""
CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def count_of(config: Config, steps: Steps) -> int:
    """The number of steps. Raises `RequestError` when the model was not trained with that many."""
    total = train_steps(config)
    if not 1 <= steps.count <= total:
        raise RequestError(f"steps must be between 1 and {total}, found {steps.count}")
    return steps.count


def custom_timesteps(config: Config, steps: Steps, *, whole: bool = False) -> Array | None:
    """The timesteps that were asked for, descending, or None. Raises `RequestError` for ones that cannot be.

    whole: for a sampler that has no sigmas, and so neither fractions nor a sigma curve.
    """
    if steps.timesteps is None:
        return None
    asked = as_float32(np.asarray(steps.timesteps, np.float64))
    if not len(asked) or (np.diff(asked) >= 0).any():
        raise RequestError(f"timesteps must descend, found {short(list(steps.timesteps))}")
    if whole and (asked % 1).any():
        raise RequestError(f"timesteps of this sampler must be whole, found {short(list(steps.timesteps))}")
    on = [] if whole else [name for name in (*CURVES, "use_lu_lambdas") if config.get(name)]
    if on:
        raise RequestError(f"timesteps cannot be chosen with {on[0]}: the sigmas choose them")
    return _checked(asked, train_steps(config))


def custom_sigmas(steps: Steps) -> Array | None:
    """The sigmas that were asked for, the one after the last step included, or None; float32 precision.

    Raises `RequestError` for ones that cannot be.
    """
    if steps.sigmas is None:
        return None
    if steps.timesteps is not None:
        raise RequestError("timesteps and sigmas cannot both be chosen: leave one of them out")
    sigmas = as_float32(np.asarray(steps.sigmas, np.float64))
    if len(sigmas) < 2 or (np.diff(sigmas) >= 0).any() or sigmas[-1] < 0:
        raise RequestError(
            f"sigmas must descend, down to the one after the last step, found {short(list(steps.sigmas))}"
        )
    return sigmas


def takes(steps: Steps, *names: str) -> None:
    """Raise `RequestError` when `steps` holds a schedule of its own other than by one of `names`."""
    for name in ("timesteps", "sigmas", "mu"):
        if getattr(steps, name) is not None and name not in names:
            raise RequestError(f"this sampler takes no {name}: leave them out or choose another --scheduler")


def ddim_timesteps(config: Config, steps: Steps) -> Array:
    """Descending whole timesteps (Lin et al. 2023, table 2), as the ancestral and DDIM samplers space them."""
    total, count = train_steps(config), count_of(config, steps)
    timesteps = even_timesteps(config, count, "leading").round()
    if timesteps[-1] < 0 and config.get("timestep_spacing") == "trailing":
        raise RequestError(
            f"timestep_spacing=trailing makes {len(timesteps)} timesteps of {count} steps, the last of them -1, of "
            f"which this sampler knows no noise level: {trailing_remedy(total, count)}"
        )
    return _checked(timesteps, total)


def even_timesteps(config: Config, count: int, default: str, last: int | None = None, more: int = 0) -> Array:
    """`count` descending timesteps by `timestep_spacing`; the DPM-Solvers take them of one more, without the 0.

    last: one past the largest, where that is not the last of training. more: how many more there are of even steps;
    trailing steps have a length of their own. Where their rounding adds up, as for 61 of 1000, diffusers' `arange`
    makes one more, timestep -1. One that is out of the training range has the sigma of its end.
    """
    total = train_steps(config)
    last = total if last is None else last
    spacing = config.one_of("timestep_spacing", default, "linspace", "leading", "trailing")
    if spacing == "linspace":
        return np.linspace(0, last - 1, count + more)[::-1][:count]
    if spacing == "leading":
        even = np.arange(count + more)[::-1] * float(last // (count + more))
        return np.asarray(even + int(config.get("steps_offset", 0)))[:count]
    return np.asarray(np.round(np.arange(last, 0, -total / count)) - 1)


def trailing_remedy(total: int, count: int) -> str:
    """What to ask for in place of `count` steps of which `trailing` makes one more."""

    def exact(n: int) -> bool:
        return math.ceil(total / (total / n)) == n

    near = [next(filter(exact, range(count - 1, 0, -1))), *islice(filter(exact, range(count + 1, total + 1)), 1)]
    return f"ask for {' or '.join(map(str, near))} steps, or for another timestep_spacing"


def _checked(timesteps: Array, total: int) -> Array:
    """`timesteps` as they are. Raises `RequestError` when one is out of the training range."""
    if timesteps.min() < 0:
        raise RequestError(
            f"timestep {timesteps.min():.0f} is negative: mend steps_offset in the scheduler configuration"
        )
    if timesteps.max() >= total:
        raise RequestError(
            f"timestep {timesteps.max():.0f} is past the {total} that the model was trained with: ask for fewer steps, "
            "or mend steps_offset"
        )
    return timesteps


def training_sigmas(config: Config, *more: str) -> Array:
    """σ_t = √((1 − ᾱ_t)/ᾱ_t) for each training timestep, float64 values of float32 precision.

    more: as for `alphas_cumprod`.
    """
    bar = alphas_cumprod(config, *more)
    if config.get("rescale_betas_zero_snr"):
        bar[-1] = _SMALLEST_BAR
    bar32 = bar.astype(np.float32)
    return np.asarray(np.sqrt((1 - bar32) / bar32), np.float64)


def at_timesteps(timesteps: Array, train: Array) -> Array:
    """Training sigmas interpolated at `timesteps`."""
    return np.interp(timesteps, np.arange(len(train)), train)


def final_sigma(config: Config, train: Array) -> float:
    """σ after the last step, as `final_sigmas_type` says."""
    return 0.0 if config.one_of("final_sigmas_type", "zero", "sigma_min") == "zero" else float(train[0])


def as_float32(values: Array) -> Array:
    """float64 values of float32 precision."""
    return np.asarray(values, np.float32).astype(np.float64)


def curve(config: Config, sigmas: Array, count: int) -> Array | None:
    """The sigma curve that the config asks for from the first to the last of `sigmas`, or None.

    Karras et al. 2022, equation 5; exponential: even steps of log σ; Lee et al. 2024, "Beta sampling is all you need".
    sigma_min and sigma_max of the config, where they are set, replace the ends.
    """
    on = [name for name in CURVES if config.get(name)]
    if len(on) > 1:
        raise RequestError(f"{on[0]} and {on[1]} cannot both be set: choose one sigma curve")
    if not on:
        return None
    low, high = config.get("sigma_min"), config.get("sigma_max")
    chosen = low is not None or high is not None
    # by place, not by size: after `rescale_betas_zero_snr` the first sigma need not be the largest
    low = float(sigmas[-1]) if low is None else float(low)
    high = float(sigmas[0]) if high is None else float(high)
    if low > high and chosen:
        raise RequestError(f"sigma_min={low:g} must not be above sigma_max={high:g}: mend these scheduler options")
    if on == ["use_karras_sigmas"]:
        ends = high ** (1 / _RHO), low ** (1 / _RHO)
        return np.asarray((ends[0] + np.linspace(0, 1, count) * (ends[1] - ends[0])) ** _RHO)
    if on == ["use_exponential_sigmas"]:
        return np.exp(np.linspace(np.log(high), np.log(low), count))
    return low + beta_quantile(1 - np.linspace(0, 1, count)) * (high - low)


def beta_quantile(q: Array) -> Array:
    """For each probability the x that a Beta(0.6, 0.6) variable is below with it, by the series of DLMF 8.17.7."""
    n = np.arange(1, _BETA_TERMS)
    series = np.append(1, np.cumprod((n - _BETA) / n) * _BETA / (_BETA + n))
    scale = math.gamma(2 * _BETA) / (_BETA * math.gamma(_BETA) ** 2)
    smaller = np.minimum(q, 1 - q)  # the density is symmetric about 1/2, and the series quick below it
    low, high = np.zeros_like(q), np.full_like(q, 0.5)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = middle**_BETA * np.polynomial.polynomial.polyval(middle, series) * scale < smaller
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(q > 0.5, 1 - low, low)


def alpha_sigma_of(bar: Array) -> tuple[Array, Array]:
    """α = √ᾱ and σ = √(1 − ᾱ) of x = α · image + σ · noise."""
    return np.sqrt(bar), np.sqrt(1 - bar)


def timesteps_of(sigmas: Array, train: Array) -> Array:
    """The (fractional) timestep of each sigma: log σ interpolated between those of the training timesteps."""
    log_train = np.log(train.astype(np.float32))
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    # the last one below: after `rescale_betas_zero_snr` they need not ascend
    below = [int(np.flatnonzero(log_train <= log_sigma).max(initial=0)) for log_sigma in log_sigmas]
    low = np.minimum(below, len(log_train) - 2)
    weight = np.clip((log_train[low] - log_sigmas) / (log_train[low] - log_train[low + 1]), 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1))
