"""Each sampler against the diffusers scheduler that it stands for, on random model outputs.

python -m diffoundry.parity.samplers
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import click
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..common.arrays import Array
from ..common.errors import RequestError
from ..runtime.loop.noise import TorchGenerator
from ..runtime.loop.step import State
from ..runtime.schedulers import SAMPLERS, STEP_ARGUMENTS, Steps, Table, make_table

SHAPE = (2, 4, 6, 6)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""What the published Stable Diffusion checkpoints say."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("linspace", "leading", "trailing")
CURVES: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)
FLOW = {"prediction_type": ("flow_prediction",), "timestep_spacing": ("linspace",)}
DYNAMIC: tuple[dict[str, Any], ...] = (
    {},
    {"use_dynamic_shifting": True, "mu": 0.8},
    {"use_dynamic_shifting": True, "mu": 1.15, "time_shift_type": "linear"},
)

DPM_NOISES: tuple[dict[str, Any], ...] = (
    *({"prediction_type": prediction, **curve} for prediction in PREDICTIONS for curve in CURVES),
    {"prediction_type": "epsilon", "use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 20.0},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    {"prediction_type": "flow_prediction"},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, **DYNAMIC[1]},
    {"prediction_type": "v_prediction", "use_flow_sigmas": True},
)
DPM_SOLVERS: tuple[dict[str, Any], ...] = (
    {},
    {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
    {"solver_order": 2, "solver_type": "heun", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"solver_order": 2, "solver_type": "heun", "algorithm_type": "sde-dpmsolver++", "lower_order_final": True},
    {"solver_order": 3, "solver_type": "heun", "euler_at_final": True, "final_sigmas_type": "sigma_min"},
    {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "lower_order_final": False},
    {"solver_order": 3, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"solver_order": 2, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    {"solver_order": 2, "algorithm_type": "deis", "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
)
SHIFTS: tuple[dict[str, Any], ...] = (
    {"use_karras_sigmas": True},
    {"flow_shift": 3.0, "shift_terminal": 0.1},
    *DYNAMIC[1:],
)
NO_PURE_NOISE = {"rescale_betas_zero_snr": False, "use_flow_sigmas": False}
"""Beside solvers of the predicted noise, which magnify rounding near pure noise a thousandfold."""
UNIPC_SOLVERS: tuple[dict[str, Any], ...] = (
    {},
    {"solver_order": 1, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "disable_corrector": [0, 3]},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    {"solver_order": 3, "disable_corrector": [1]},
    {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"predict_x0": False, "final_sigmas_type": "sigma_min", **NO_PURE_NOISE},
    {"predict_x0": False, "solver_order": 3, "final_sigmas_type": "sigma_min", **NO_PURE_NOISE},
)
SA_SOLVERS: tuple[dict[str, Any], ...] = (
    {},
    {"predictor_order": 1, "corrector_order": 1},
    {"predictor_order": 3, "corrector_order": 4},
    {"predictor_order": 4, "corrector_order": 2, "lower_order_final": False},
    {"algorithm_type": "noise_prediction", **NO_PURE_NOISE},
    {"predictor_order": 3, "corrector_order": 3, "algorithm_type": "noise_prediction", **NO_PURE_NOISE},
    {"predictor_order": 3, "corrector_order": 3, "lower_order_final": False},
)
EDM_CURVES = (
    {"sigma_schedule": "karras"},
    {"sigma_schedule": "exponential"},
    {"sigma_min": 0.01, "sigma_max": 120.0, "sigma_data": 1.0, "rho": 5.0},
)

LIMIT = 1e-5
"""Largest relative error of a trajectory in float32."""
TABLE_LIMIT = 1e-9
"""Largest relative error of a table in float64."""
VARIANTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {
        "eta": (0.0, 0.7),
        "clip": ({"clip_sample": False}, {}, {"clip_sample_range": 2.5, "use_clipped_model_output": True}),
        "set_alpha_to_one": (True, False),
        "rescale_betas_zero_snr": (False, True),
    },
    "DDIMInverseScheduler": {"clip_sample": (True, False), "set_alpha_to_one": (True, False)},
    "DDPMScheduler": {
        "clip": ({"clip_sample": False}, {}, {"clip_sample_range": 2.5}),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
        "betas": (
            {},
            {"rescale_betas_zero_snr": True},
            *({"beta_schedule": schedule} for schedule in ("squaredcos_cap_v2", "sigmoid", "laplace")),
        ),
    },
    "EulerDiscreteScheduler": {
        "curve": (
            *CURVES,
            {"rescale_betas_zero_snr": True},
            {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 20.0},
        ),
        "final_sigmas_type": ("zero", "sigma_min"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    },
    "EulerAncestralDiscreteScheduler": {
        "prediction_type": ("epsilon", "v_prediction"),
        "rescale_betas_zero_snr": (False, True),
    },
    "HeunDiscreteScheduler": {
        "curve": CURVES,
        "clip_sample": (False, True),
        "clip_sample_range": (1.0, 2.5),
        "beta_schedule": ("scaled_linear", "exp"),
    },
    "LMSDiscreteScheduler": {"curve": CURVES, "beta_schedule": ("scaled_linear", "squaredcos_cap_v2")},
    "KDPM2DiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction"), "curve": CURVES},
    "KDPM2AncestralDiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction"), "curve": CURVES},
    "EDMEulerScheduler": {
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading",),
        "curve": EDM_CURVES,
        "final_sigmas_type": ("zero", "sigma_min"),
    },
    "EDMDPMSolverMultistepScheduler": {
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading",),
        "curve": EDM_CURVES,
        "solver_order": (1, 2, 3),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "lower_order_final": (True, False),
        "euler_at_final": (False, True),
        "final_sigmas_type": ("zero", "sigma_min"),
    },
    "IPNDMScheduler": {"prediction_type": ("epsilon",), "timestep_spacing": ("leading",)},
    "FlowMatchEulerDiscreteScheduler": {
        **FLOW,
        "shift": (1.0, 3.0),
        "curve": CURVES,
        "shift_terminal": (None, 0.1),
        "invert_sigmas": (False, True),
        "stochastic_sampling": (False, True),
        "dynamic": DYNAMIC,
    },
    "FlowMatchHeunDiscreteScheduler": {**FLOW, "shift": (1.0, 3.0), "s_churn": (0.0, 5.0), "s_tmin": (0.0, 0.4)},
    "FlowMatchLCMScheduler": {
        **FLOW,
        "shift": (1.0, 3.0),
        "curve": CURVES,
        "shift_terminal": (None, 0.1),
        "invert_sigmas": (False, True),
        "dynamic": DYNAMIC,
    },
    "LCMScheduler": {
        "clip_sample": (True, False),
        "original_inference_steps": (60, 100),
        "timestep_scaling": (10.0, 3.0),
        "rescale_betas_zero_snr": (False, True),
    },
    "TCDScheduler": {
        "original_inference_steps": (60, 100),
        "eta": (0.0, 0.3, 1.0),
        "rescale_betas_zero_snr": (False, True),
    },
    "DPMSolverMultistepScheduler": {
        "prediction_type": ("epsilon",),
        "noises": (*DPM_NOISES, {"prediction_type": "epsilon", "use_lu_lambdas": True}),
        "solver": DPM_SOLVERS,
    },
    "DPMSolverSinglestepScheduler": {
        "prediction_type": ("epsilon",),
        "timestep_spacing": ("linspace", "leading"),
        "noises": DPM_NOISES,
        "solver": DPM_SOLVERS,
    },
    "DEISMultistepScheduler": {
        "prediction_type": ("epsilon",),
        "noises": DPM_NOISES,
        "solver_order": (1, 2, 3),
        "algorithm_type": ("deis", "dpmsolver++"),
        "solver_type": ("logrho", "midpoint"),
        "lower_order_final": (True, False),
    },
    "PNDMScheduler": {"prediction_type": ("epsilon", "v_prediction"), "set_alpha_to_one": (True, False)},
    "UniPCMultistepScheduler": {
        "prediction_type": ("epsilon",),
        "noises": (
            *DPM_NOISES,
            *({"prediction_type": "flow_prediction", "use_flow_sigmas": True, **shift} for shift in SHIFTS),
        ),
        "solver": UNIPC_SOLVERS,
    },
    "SASolverScheduler": {"prediction_type": ("epsilon",), "noises": DPM_NOISES, "solver": SA_SOLVERS},
}
"""By diffusers class: what to vary beside prediction, spacing, steps and start. A dict is several options at once."""
PASSED = {"eta": 0.0}
"""Arguments of `step` that diffusers' pipelines pass by default."""
_ROUNDED = ("sqrt", "pow", "__pow__", "exp", "log", "sin", "cos", "atan2")
_SHOWN = 3
"""Most cases of one sampler that are shown when they fail."""


def variants(class_name: str) -> Iterator[dict[str, Any]]:
    """Every configuration of a diffusers class that is compared."""
    axes: dict[str, tuple[Any, ...]] = {"prediction_type": PREDICTIONS, "timestep_spacing": SPACINGS}
    axes.update(VARIANTS[class_name])
    for values in itertools.product(*axes.values()):
        config: dict[str, Any] = dict(SD)
        for option, value in zip(axes, values, strict=True):
            config.update(value if isinstance(value, dict) else {option: value})
        yield config


def diffusers_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler that the sampler `name` stands for."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.class_name).from_config({**config, **sampler.fixed})


def step_options(scheduler: Any, beyond: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What `step` of `scheduler` is given beside its usual three: as the pipelines do, or as `beyond` says."""
    accepted = inspect.signature(scheduler.step).parameters
    return {option: value for option, value in (PASSED | dict(beyond)).items() if option in accepted}


def diffusers_trajectory(
    scheduler: Any, steps: Steps, outputs: Array, seed: int, beyond: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Array, list[Array], list[Array]]:
    """Timesteps, model inputs and states of a diffusers scheduler fed with `outputs`, float32."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    given = {"timesteps": steps.timesteps, "sigmas": steps.sigmas, "mu": steps.mu}
    custom = {
        key: list(value) if isinstance(value, tuple) else value for key, value in given.items() if value is not None
    }
    if steps.timesteps or steps.sigmas:
        scheduler.set_timesteps(**custom)
    else:
        scheduler.set_timesteps(steps.count, **custom)
    begin = steps.start * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    noise = torch.randn(SHAPE, generator=generator)
    if steps.start:
        add = getattr(scheduler, "scale_noise", None)
        image = torch.from_numpy(outputs[-1])
        if add is None:
            x = scheduler.add_noise(image, noise, timesteps[:1].repeat(len(image)))
        else:
            x = add(image, timesteps[:1], noise)
    else:
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    options = step_options(scheduler, {**beyond, "generator": generator})
    inputs, states = [], [x.numpy()]
    for k, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        inputs.append(scaled.numpy())
        x = scheduler.step(torch.from_numpy(outputs[k]), timestep, x, **options).prev_sample
        states.append(x.numpy())
    return timesteps.numpy(), inputs, states


def our_trajectory(table: Table, steps: Steps, outputs: Array, seed: int) -> tuple[Array, list[Array], list[Array]]:
    """Timesteps, model inputs and states of `table` fed with `outputs`."""
    generator = TorchGenerator(seed)
    noise = generator.randn(*SHAPE)
    if steps.start:
        alpha, sigma = table.alpha_sigma[0].astype(np.float32)
        x = alpha * outputs[-1] + sigma * noise
    else:
        x = noise * np.float32(table.init_scale)
    state = State(table, x)
    inputs, states = [], [x]
    for k in range(table.steps):
        inputs.append(state.model_input())
        state.advance(outputs[k], generator.randn(*SHAPE) if table.draws[k] else None)
        states.append(state.x.copy())
    return table.timesteps, inputs, states


def exact_trajectory(
    name: str,
    config: Mapping[str, Any],
    steps: Steps,
    ours: tuple[Array, list[Array], list[Array]],
    noises: list[Array],
    outputs: Array,
    beyond: Mapping[str, Any],
) -> tuple[Array, list[Array], list[Array]]:
    """What a diffusers scheduler makes of our first x, outputs and noise when its code runs in float64."""
    from ..export.stages.trace_scheduler import run_in_float64

    calls = len(ours[0])
    given = np.zeros((1 + 2 * calls, ours[2][0].size))
    given[0] = ours[2][0].reshape(-1)
    for k in range(calls):
        given[1 + 2 * k], given[2 + 2 * k] = outputs[k].reshape(-1), noises[k].reshape(-1)
    with _CorrectlyRounded():
        scheduler = diffusers_scheduler(name, config)
        options = step_options(scheduler, beyond)
        timesteps, inputs, states = run_in_float64(scheduler, steps, given, **options)
    return timesteps, list(inputs.reshape(calls, *SHAPE)), list(states.reshape(calls + 1, *SHAPE))


def worst_error(
    found: tuple[Array, list[Array], list[Array]], expected: tuple[Array, list[Array], list[Array]]
) -> float:
    """The largest difference of inputs and states, relative to the largest state so far.

    float32 keeps seven digits of the largest state: after large sigmas the small states have lost theirs.
    Infinite when the timesteps differ or a state is not finite.
    """
    if found[0].shape != expected[0].shape or not np.allclose(found[0], expected[0], rtol=1e-6, atol=1e-3):
        return np.inf
    largest = np.maximum.accumulate([max(1.0, float(np.abs(state).max())) for state in expected[2]])
    pairs = [*zip(found[2], expected[2], largest, strict=True), *zip(found[1], expected[1], largest[:-1], strict=True)]
    worst = float(np.max([np.abs(a - b).max() / scale for a, b, scale in pairs]))
    return worst if np.isfinite(worst) else np.inf


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case: the error to diffusers in float32, or what we refused; and whether that is as it should be.

    exact: the error to diffusers' code run in float64, where the first is above `LIMIT`: then it is diffusers' own
    float32 that has lost the digits, or ours.
    """

    error: float | None
    exact: float | None
    refusal: str
    passed: bool


def judge(name: str, config: Mapping[str, Any], steps: Steps, seed: int) -> Verdict:
    """Run one case on both sides, fed with the same random outputs. What we refuse, diffusers must fail at."""
    own = {option: value for option, value in config.items() if option not in STEP_ARGUMENTS}
    beyond = {option: value for option, value in config.items() if option in STEP_ARGUMENTS}
    outputs = np.random.default_rng(seed).standard_normal((2 * steps.count + 10, *SHAPE)).astype(np.float32)
    try:
        table = make_table(own, steps, name, beyond)
    except RequestError as refusal:
        try:
            theirs = diffusers_trajectory(diffusers_scheduler(name, own), steps, outputs, seed, beyond)
        except Exception:  # each scheduler has its own ways of failing
            return Verdict(None, None, str(refusal), True)
        # noise predicted from pure noise: diffusers may clamp the infinity to its sign;
        # timestep -1: diffusers takes the last noise level of training for it, by its index from the end
        meaningless = "pure noise" in str(refusal) or (
            "timestep_spacing=trailing" in str(refusal) and theirs[0].min() < 0
        )
        return Verdict(None, None, str(refusal), meaningless or not np.isfinite(theirs[2]).all())
    ours = our_trajectory(table, steps, outputs, seed)
    theirs = diffusers_trajectory(diffusers_scheduler(name, own), steps, outputs, seed, beyond)
    error = worst_error(ours, theirs)
    if error < LIMIT:
        return Verdict(error, None, "", True)
    generator = TorchGenerator(seed)
    generator.randn(*SHAPE)
    noises = [generator.randn(*SHAPE) if drawn else np.zeros(SHAPE) for drawn in table.draws]
    exact = worst_error(ours, exact_trajectory(name, own, steps, ours, noises, outputs, beyond))
    return Verdict(error, exact, "", exact < LIMIT)


class _CorrectlyRounded(TorchFunctionMode):  # type: ignore[misc]
    """Torch whose float32 functions are those of float64, rounded: its own differ from machine to machine by a bit."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _ROUNDED:
            return func(*args, **(kwargs or {}))
        narrow = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 for arg in args)
        wide = [arg.double() if isinstance(arg, torch.Tensor) and narrow else arg for arg in args]
        result = func(*wide, **(kwargs or {}))
        return result.float() if narrow else result


def table_error(name: str, config: Mapping[str, Any], steps: Steps) -> float:
    """The largest relative difference, in float64, between a sampler's table and the one read off diffusers' code.

    Compared are what every state owes to the first x, each model output and each noise, the model inputs and, where
    diffusers can noise an image, the levels. NaN for what cannot be traced: a table that clamps, a run that is not
    finite in float64. Infinite when timesteps or draws differ.
    """
    from ..export.stages.trace_scheduler import impulse_responses, trace_scheduler

    own = {option: value for option, value in config.items() if option not in STEP_ARGUMENTS}
    beyond = {option: value for option, value in config.items() if option in STEP_ARGUMENTS}
    table = make_table(own, steps, name, beyond)
    if np.isfinite(table.clip):
        return float("nan")
    with _CorrectlyRounded():
        scheduler = diffusers_scheduler(name, own)
        try:
            traced = trace_scheduler(scheduler, steps, **step_options(scheduler, beyond))
        except RequestError:
            return float("nan")
    if not np.allclose(table.timesteps, traced.timesteps, rtol=1e-6, atol=1e-3) or (table.draws != traced.draws).any():
        return np.inf
    found, expected = impulse_responses(table), impulse_responses(traced)
    for states, by in ((found, table), (expected, traced)):
        states[:, 0] *= by.init_scale
    largest = np.maximum.accumulate(np.abs(expected).max(1, keepdims=True))
    pairs = [
        (found / largest, expected / largest),
        (found[:-1] * table.input_scale[:, None], expected[:-1] * traced.input_scale[:, None]),
    ]
    if hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise"):
        pairs.append((table.alpha_sigma, traced.alpha_sigma))
    return max(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs)


@click.command()
@click.argument("samplers", nargs=-1)
@click.option("--cases", default=60, show_default=True, help="Cases of each sampler: configuration, steps and start.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of cases.")
def main(samplers: tuple[str, ...], cases: int, seed: int) -> None:
    """Print the worst relative errors of each of SAMPLERS (default: all) over its configurations.

    float32: our trajectory against diffusers'. Where that is above 1e-5, float64 holds ours against diffusers' code
    run in float64, which tells whose digits were lost. table: weights in float64 against those read off the code.
    """
    unknown = [name for name in samplers if name not in SAMPLERS]
    if unknown:
        raise click.UsageError(f"no sampler {unknown[0]!r}: choose of {', '.join(SAMPLERS)}")
    print(f"{'sampler':20} {'float32':>8} {'float64':>8} {'table':>8}  cases (traced, refused as diffusers fails)")
    bad = 0
    for name in samplers or SAMPLERS:
        rng = np.random.default_rng(seed)
        configs = list(variants(SAMPLERS[name].class_name))
        order = rng.permutation(max(cases, len(configs)))[:cases] % len(configs)
        worst, worst_table, refused, failed, traced = Verdict(0.0, 0.0, "", True), 0.0, 0, 0, 0
        for case, chosen in enumerate(order):
            config = configs[chosen]
            count = int(rng.integers(1, 131))
            start = int(rng.integers(0, count)) if rng.random() < 0.5 else 0
            steps = Steps(count, start=start, mu=config.get("mu"))
            verdict = judge(name, config, steps, case)
            error = float("nan") if verdict.error is None else table_error(name, config, steps)
            worst_table = max(worst_table, 0.0 if np.isnan(error) else error)
            traced += not np.isnan(error)
            if not verdict.passed or error > TABLE_LIMIT:
                bad += 1
                failed += 1
                if failed <= _SHOWN:
                    print(f"  {steps} {config}: {verdict} table {error:.1e}")
            if verdict.error is None:
                refused += 1
            else:
                exact = max(worst.exact or 0.0, verdict.exact or 0.0)
                worst = Verdict(max(worst.error or 0.0, verdict.error), exact, "", True)
        shown = f"{worst.exact:8.1e}" if worst.exact else f"{'':8}"
        print(
            f"{name:20} {worst.error:8.1e} {shown} {worst_table:8.1e}  {cases} ({traced}, {refused})",
            flush=True,
        )
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
