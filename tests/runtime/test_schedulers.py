"""Each table against the diffusers scheduler it stands for: whole trajectories, and the tables read off its code."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from diffoundry.benchmarks.samplers import SD, TABLE_LIMIT, judge, table_error, variants
from diffoundry.bundle import RequestError
from diffoundry.runtime.schedulers import SAMPLERS, Steps, find_sampler, make_table
from diffoundry.runtime.schedulers.config import Config, alphas_cumprod
from diffoundry.runtime.schedulers.incomplete_beta import beta_quantile

CONFIGURATIONS = {name: list(variants(sampler.class_name)) for name, sampler in SAMPLERS.items()}
SCHEDULES = ["scaled_linear", "linear", "squaredcos_cap_v2"]


@st.composite
def cases(draw):
    """A sampler, one of its configurations, and which steps."""
    name = draw(st.sampled_from(list(SAMPLERS)))
    config = draw(st.sampled_from(CONFIGURATIONS[name]))
    count = draw(st.integers(1, 60))
    start = draw(st.integers(0, count - 1))
    return name, config, Steps(count, start=start, mu=config.get("mu"))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(case=cases(), seed=st.integers(0, 2**40))
def test_trajectories_equal_those_of_diffusers(case, seed):
    verdict = judge(*case, seed)
    assert verdict.passed, verdict


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases())
def test_tables_equal_those_read_off_diffusers(case):
    try:
        error = table_error(*case)
    except RequestError:
        return  # the test of trajectories holds what we refuse
    assert np.isnan(error) or error < TABLE_LIMIT, error  # NaN is what cannot be traced


@pytest.mark.slow
@settings(max_examples=6000, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**40))
def test_many_more_trajectories_equal_those_of_diffusers(case, seed):
    verdict = judge(*case, seed)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_is_compared(name):
    """A fixed case of each, so that none depends on luck."""
    for config, steps in zip(
        CONFIGURATIONS[name][:: max(1, len(CONFIGURATIONS[name]) // 4)], (20, 1, 7, 33), strict=False
    ):
        verdict = judge(name, config, Steps(steps, mu=config.get("mu")), 0)
        assert verdict.passed, verdict


def test_the_beta_schedules_equal_those_of_diffusers_to_the_last_bit():
    for schedule in SCHEDULES:
        for steps in (1000, 999, 50):
            config = {**SD, "beta_schedule": schedule, "num_train_timesteps": steps}
            expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
            np.testing.assert_array_equal(alphas_cumprod(Config(config)), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_of_zero_terminal_signal(schedule):
    config = {**SD, "beta_schedule": schedule, "rescale_betas_zero_snr": True}
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(Config(config)), expected, rtol=3e-6, atol=1e-9)


def test_trained_betas_are_taken():
    betas = list(np.linspace(0.001, 0.03, 20))
    config = {"trained_betas": betas, "num_train_timesteps": 20}
    expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_array_equal(alphas_cumprod(Config(config)), expected)
    with pytest.raises(RequestError, match="num_train_timesteps=1000 values, found 20"):
        make_table({"trained_betas": betas}, 5, "ddim")


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (2.0, 5.0), (1.0, 1.0), (0.5, 3.0)])
def test_the_beta_quantile_is_that_of_scipy(a, b):
    for q in (0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0):
        assert beta_quantile(q, a, b) == pytest.approx(scipy.stats.beta.ppf(q, a, b), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("name", ["ddpm", "euler", "heun", "dpm++2m", "dpm++2s", "lcm", "tcd", "flow-euler"])
def test_timesteps_of_ones_own(name):
    timesteps = (999.0, 801.0, 500.0, 259.0, 39.0)
    verdict = judge(name, dict(SD), Steps(5, timesteps=timesteps), 1)
    assert verdict.passed, verdict
    assert verdict.error is not None
    np.testing.assert_allclose(make_table(SD, Steps(5, timesteps=timesteps), name).timesteps[0], 999)


@pytest.mark.parametrize(
    ("name", "sigmas"), [("euler", (14.6, 6.0, 2.0, 0.5, 0.0)), ("flow-euler", (1.0, 0.8, 0.5, 0.2)), ("unipc", None)]
)
def test_sigmas_of_ones_own(name, sigmas):
    if sigmas is None:
        with pytest.raises(RequestError, match="use_flow_sigmas"):
            make_table(SD, Steps(5, sigmas=(3.0, 1.0)), name)
        return
    verdict = judge(name, dict(SD), Steps(4, sigmas=sigmas), 1)
    assert verdict.passed, verdict
    assert verdict.error is not None


def test_unknown_scheduler_suggests_the_nearest():
    with pytest.raises(RequestError, match=r"did you mean 'dpm\+\+2m'"):
        find_sampler(SD, "dpm+2m")


def test_class_names_are_accepted():
    assert find_sampler(SD, "EulerDiscreteScheduler") == ("EulerDiscreteScheduler", SAMPLERS["euler"])


def test_a_checkpoint_with_an_unknown_scheduler_asks_for_one():
    with pytest.raises(RequestError, match="CosineScheduler is not supported: add --scheduler"):
        make_table({**SD, "_class_name": "CosineScheduler"}, 20)


@pytest.mark.parametrize(
    ("sampler", "options", "named"),
    [
        ("ddim", {"thresholding": True}, "thresholding=True"),
        ("ddpm", {"variance_type": "learned"}, "variance_type='learned'"),
        ("ddim", {"timestep_spacing": "random"}, "'random'"),
        ("ddim", {"beta_schedule": "wild"}, "'wild'"),
        ("lcm", {"prediction_type": "flow"}, "'flow'"),
        ("euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "cannot both be set"),
        ("dpm2m", {"final_sigmas_type": "zero"}, "final_sigmas_type"),
        ("unipc", {"solver_p": {}}, "solver_p"),
    ],
)
def test_unsupported_options_are_named(sampler, options, named):
    with pytest.raises(RequestError, match=named.replace("(", r"\(")):
        make_table(SD, 10, sampler, options)


def test_an_option_that_the_sampler_does_not_have_is_named():
    with pytest.raises(RequestError, match="euler has no scheduler option 'solver_order'"):
        make_table(SD, 10, "euler", {"solver_order": 2})
    make_table({**SD, "solver_order": 2}, 10, "euler")  # a configuration file may speak to other samplers


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_range_are_refused(sampler, steps):
    with pytest.raises(RequestError, match="steps"):
        make_table(SD, steps, sampler)


@pytest.mark.parametrize("start", [-1, 20, 100])
def test_a_start_out_of_range_is_refused(start):
    with pytest.raises(RequestError, match="first step must be between 0 and 19"):
        make_table(SD, Steps(20, start=start), "ddim")


def test_a_short_name_fixes_its_options_and_a_class_name_leaves_them():
    config = {**SD, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}
    own, by_class, by_name = (make_table(config, 10, name) for name in (None, "DPMSolverMultistepScheduler", "dpm++2m"))
    np.testing.assert_array_equal(own.weights, by_class.weights)
    assert own.registers != by_name.registers
    assert find_sampler(config, None)[0] == "DPMSolverMultistepScheduler"


def test_options_that_a_configuration_only_has_by_default_are_the_samplers_own():
    config = {**SD, "timestep_spacing": "linspace", "_use_default_values": ["timestep_spacing"]}
    np.testing.assert_array_equal(make_table(config, 10, "ddim").timesteps, make_table(SD, 10, "ddim").timesteps)
    assert diffusers.DDIMScheduler.from_config(config).config.timestep_spacing == "leading"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpm++2m"])
def test_trailing_spacing_has_as_many_steps_as_asked_for(sampler):
    for steps in (61, 103, 499, 998):
        table = make_table({**SD, "timestep_spacing": "trailing"}, steps, sampler)
        assert table.steps == steps
        assert table.timesteps.min() >= 0


def test_trailing_timesteps_are_those_of_diffusers():
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        table = make_table({"timestep_spacing": "trailing", "clip_sample": False}, steps, "ddim")
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps[:steps].numpy())
