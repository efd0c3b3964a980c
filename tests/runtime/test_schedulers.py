"""Each table against the diffusers scheduler it stands for: whole trajectories on random model outputs."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffoundry.bundle import RequestError
from diffoundry.runtime.noise import TorchGenerator
from diffoundry.runtime.schedulers import SAMPLERS, find_sampler, make_table
from diffoundry.runtime.schedulers.config import alphas_cumprod
from diffoundry.runtime.step import step

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 6, 6)


def diffusers_trajectory(scheduler, steps, outputs, seed):
    """Timesteps, model inputs and states of a diffusers scheduler fed with `outputs`."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    inputs, states = [], [x.numpy()]
    options = {} if type(scheduler).__name__ == "DDIMScheduler" else {"generator": generator}
    for k, timestep in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(x, timestep).numpy())
        x = scheduler.step(torch.from_numpy(outputs[k]), timestep, x, **options).prev_sample
        states.append(x.numpy())
    return scheduler.timesteps.numpy(), inputs, states


def our_trajectory(config, sampler, steps, outputs, seed):
    table = make_table(config, steps, sampler)
    generator = TorchGenerator(seed)
    registers = np.zeros((table.registers, *SHAPE), np.float32)
    registers[0] = generator.randn(*SHAPE) * np.float32(table.init_scale)
    inputs, states = [], [registers[0].copy()]
    for k in range(table.steps):
        inputs.append(registers[0] * np.float32(table.input_scale[k]))
        noise = generator.randn(*SHAPE) if table.c[k].any() else None
        registers = step(table, k, registers, outputs[k], noise)
        states.append(registers[0].copy())
    return table.timesteps, inputs, states


@settings(max_examples=150, deadline=None)
@given(
    sampler=st.sampled_from(list(SAMPLERS)),
    steps=st.integers(1, 50),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    spacing=st.sampled_from(["linspace", "leading", "trailing"]),
    schedule=st.sampled_from(["scaled_linear", "linear", "squaredcos_cap_v2"]),
    clip=st.booleans(),
    to_one=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_trajectory_equals_diffusers(sampler, steps, prediction, spacing, schedule, clip, to_one, seed):
    config = {
        **SD,
        "beta_schedule": schedule,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "clip_sample": clip,
        "set_alpha_to_one": to_one,
    }
    kind = getattr(diffusers, SAMPLERS[sampler].class_name)
    outputs = np.random.default_rng(seed).standard_normal((steps, *SHAPE)).astype(np.float32)
    try:
        timesteps, inputs, states = diffusers_trajectory(kind.from_config(config), steps, outputs, seed)
    except IndexError:  # diffusers runs past its betas: ours says so
        with pytest.raises(RequestError, match="past the"):
            make_table(config, steps, sampler)
        return
    found_timesteps, found_inputs, found_states = our_trajectory(config, sampler, steps, outputs, seed)
    np.testing.assert_allclose(found_timesteps, timesteps, atol=1e-3)
    # float32 keeps 7 digits of the largest state so far: with large sigmas the small ones after it lose theirs
    largest = np.maximum.accumulate([max(1.0, float(np.abs(state).max())) for state in states])
    for k, (found, expected) in enumerate(zip(found_states, states, strict=True)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * largest[k])
    for k, (found, expected) in enumerate(zip(found_inputs, inputs, strict=True)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * largest[k])


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_betas_equal_diffusers_to_the_last_bit_or_two(schedule, zero_snr):
    config = {**SD, "beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(config), expected, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("options", [{"solver_order": 1}, {"euler_at_final": True}, {"final_sigmas_type": "sigma_min"}])
def test_options_of_dpm_solver(solver, options):
    config = {**SD, "_class_name": "DPMSolverMultistepScheduler", "solver_type": solver, **options}
    outputs = np.random.default_rng(0).standard_normal((18, *SHAPE)).astype(np.float32)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    _, _, states = diffusers_trajectory(scheduler, 18, outputs, 3)
    _, _, found = our_trajectory(config, None, 18, outputs, 3)
    np.testing.assert_allclose(found[-1], states[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_variance_types_of_ddpm(variance):
    config = {**SD, "_class_name": "DDPMScheduler", "variance_type": variance, "clip_sample": False}
    outputs = np.random.default_rng(0).standard_normal((9, *SHAPE)).astype(np.float32)
    _, _, states = diffusers_trajectory(diffusers.DDPMScheduler.from_config(config), 9, outputs, 3)
    _, _, found = our_trajectory(config, None, 9, outputs, 3)
    np.testing.assert_allclose(found[-1], states[-1], rtol=1e-4, atol=1e-4)


def test_unknown_scheduler_suggests_the_nearest():
    with pytest.raises(RequestError, match=r"did you mean 'dpm\+\+2m'"):
        find_sampler(SD, "dpm2m")


def test_class_names_are_accepted():
    assert find_sampler(SD, "EulerDiscreteScheduler") == ("EulerDiscreteScheduler", SAMPLERS["euler"])


def test_a_checkpoint_with_an_unknown_scheduler_asks_for_one():
    with pytest.raises(RequestError, match="PNDMScheduler is not supported: add --scheduler"):
        make_table({**SD, "_class_name": "PNDMScheduler"}, 20)


@pytest.mark.parametrize(
    ("sampler", "options", "named"),
    [
        ("ddim", {"thresholding": True}, "thresholding=True"),
        ("euler", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("dpm++2m", {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ("ddpm", {"variance_type": "learned"}, "variance_type='learned'"),
        ("ddim", {"timestep_spacing": "random"}, "'random'"),
        ("ddim", {"beta_schedule": "sigmoid"}, "'sigmoid'"),
        ("lcm", {"prediction_type": "flow"}, "'flow'"),
    ],
)
def test_unsupported_options_are_named(sampler, options, named):
    with pytest.raises(RequestError, match=named.replace("(", r"\(")):
        make_table({**SD, **options}, 10, sampler)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_range_are_refused(sampler, steps):
    with pytest.raises(RequestError, match="steps"):
        make_table(SD, steps, sampler)


def test_a_short_name_fixes_its_options_and_a_class_name_leaves_them():
    config = {**SD, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}
    own, by_class, by_name = (make_table(config, 10, name) for name in (None, "DPMSolverMultistepScheduler", "dpm++2m"))
    np.testing.assert_array_equal(own.A, by_class.A)
    assert not np.allclose(own.A, by_name.A)
    assert find_sampler(config, None)[0] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpm++2m"])
def test_trailing_spacing_has_as_many_steps_as_asked_for(sampler):
    for steps in (61, 103, 499, 998):
        table = make_table({**SD, "timestep_spacing": "trailing"}, steps, sampler)
        assert table.steps == steps
        assert table.timesteps.min() >= 0
