"""Each table against the diffusers scheduler it stands for: whole trajectories, and the tables read off its code."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import re

import diffusers
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from diffoundry.bundle import Bundle
from diffoundry.common.errors import DiffoundryError, RequestError
from diffoundry.parity.samplers import SD, TABLE_LIMIT, judge, table_error, variants
from diffoundry.runtime.schedule import Schedules
from diffoundry.runtime.schedulers import SAMPLERS, STEP_ARGUMENTS, Steps, find_sampler, make_table
from diffoundry.runtime.schedulers.config import Config, alphas_cumprod
from diffoundry.runtime.schedulers.spacing import beta_quantile

CLASSES = sorted({sampler.class_name for sampler in SAMPLERS.values()})
CONFIGURATIONS = {name: list(variants(sampler.class_name)) for name, sampler in SAMPLERS.items()}
SCHEDULES = ["scaled_linear", "linear", "squaredcos_cap_v2"]


def name_of(class_name):
    """A short name of a class that fixes no options if it has one, to be told to `judge`."""
    names = [name for name, sampler in SAMPLERS.items() if sampler.class_name == class_name]
    return min(names, key=lambda name: len(SAMPLERS[name].fixed))


@st.composite
def cases(draw):
    """A sampler, one of its configurations, and which steps."""
    name = draw(st.sampled_from(list(SAMPLERS)))
    config = draw(st.sampled_from(CONFIGURATIONS[name]))
    count = draw(st.integers(1, 130))
    start = draw(st.integers(0, count - 1))
    return name, config, Steps(count, start=start, mu=config.get("mu"))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases(), seed=st.integers(0, 2**40))
def test_trajectories_equal_those_of_diffusers(case, seed):
    verdict = judge(*case, seed)
    assert verdict.passed, verdict


@settings(max_examples=60, deadline=None, derandomize=True)
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


def test_the_beta_quantile_is_that_of_scipy():
    q = np.array([0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
    np.testing.assert_allclose(beta_quantile(q), scipy.stats.beta.ppf(q, 0.6, 0.6), rtol=1e-10, atol=1e-14)


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


SPACED = [
    name
    for name in CLASSES
    if "timestep_spacing" in inspect.signature(getattr(diffusers, name)).parameters
    and name not in ("LCMScheduler", "TCDScheduler")  # which space by their distillation
]
BY_LEVEL = {"DDIMScheduler", "DDIMInverseScheduler", "DDPMScheduler", "PNDMScheduler"}
"""Those that take the noise level of a timestep by its index, which for -1 is the last of training."""


def timesteps_of_both(name, config, steps):
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    return make_table(config, steps, name).timesteps, scheduler.timesteps.numpy()


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("steps", [61, 103])
def test_one_trailing_timestep_more_is_made_or_refused(name, steps):
    """diffusers' rounded steps make timestep -1 after the 0."""
    config = {**SD, "timestep_spacing": "trailing", "skip_prk_steps": True}
    if name not in BY_LEVEL:
        ours, theirs = timesteps_of_both(name, config, steps)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
        assert theirs[-1] == -1
        verdict = judge(name_of(name), config, Steps(steps, start=5), 0)
        assert verdict.passed, verdict
        return
    with pytest.raises(RequestError, match=f"makes {steps + 1} timesteps of {steps} steps") as refused:
        make_table(config, steps, name)
    remedies = [int(count) for count in re.findall(r"ask for (\d+) or (\d+) steps", str(refused.value))[0]]
    for count in remedies:
        assert make_table(config, count, name).steps == len(timesteps_of_both(name, config, count)[1])


ROUNDED = [count for count in range(1, 1001) if math.ceil(1000 / (1000 / count)) != count]
"""Counts of steps that `trailing` makes one more of."""
EVERY = dict.fromkeys(SPACED, 11) | dict.fromkeys(["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"], 90)
EVERY |= dict.fromkeys(["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"], 1)
"""Every how manieth count is compared beside the rounded ones: all of one class of each way to space."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_of_every_count_are_those_of_diffusers(name, spacing):
    """What we refuse, diffusers refuses too, or has no noise level of, or makes no finite numbers of."""
    config = {**SD, "timestep_spacing": spacing, "skip_prk_steps": True}
    scheduler = getattr(diffusers, name).from_config(config)
    compared = 0
    for steps in sorted({*range(1, 1001, EVERY[name]), *ROUNDED, 999, 1000}):
        try:
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.numpy()
        except ValueError:
            theirs = None
        try:
            ours = make_table(config, steps, name).timesteps
        except RequestError:
            ours = None
        if ours is None:
            without_level = theirs is not None and name in BY_LEVEL and theirs.min() == -1
            assert theirs is None or without_level or judge(name_of(name), config, Steps(steps), 0).passed, steps
            continue
        assert theirs is not None, steps
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-3, err_msg=str(steps))
        compared += 1
    assert compared or (name, spacing) == ("DDIMInverseScheduler", "linspace")


def test_trailing_timesteps_are_those_of_diffusers():
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    refused = []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        try:
            table = make_table({"timestep_spacing": "trailing", "clip_sample": False}, steps, "ddim")
        except RequestError:
            refused.append(steps)
            assert scheduler.timesteps[-1] == -1
            continue
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    assert 61 in refused
    assert len(refused) < 100


@pytest.mark.parametrize("curve", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_a_curve_on_zero_terminal_signal_begins_at_the_last_sigma_not_the_largest(curve, spacing):
    """The last sigma of training is 4096, the one before it 15406."""
    config = {"beta_schedule": "linear", "prediction_type": "v_prediction", "timestep_spacing": spacing, curve: True}
    config["rescale_betas_zero_snr"] = True
    for name in CLASSES:
        known = inspect.signature(getattr(diffusers, name)).parameters
        if not {curve, "rescale_betas_zero_snr"} <= set(known):
            continue
        ours, theirs = timesteps_of_both(name, config, 6)
        np.testing.assert_allclose(ours, theirs, atol=1e-2)
        verdict = judge(name_of(name), config, Steps(6), 0)
        assert verdict.passed, verdict


STRANGE = [
    *(10**400, -(10**400), 10**5000, 10**9, 2**63, 1e308, -1e308, 1e-320, -1, 0, -0.0, 2.5, 1.0, 3),
    *(float("nan"), float("inf"), -float("inf"), True, False, None, "", "1", "zero", "sigma_min", "x" * 500, "a\nb"),
    *([], [1], [[1, [2]]], [10**400], [float("nan")] * 1000, [0.5] * 1000, ["a"], {}, {"a": {"b": 1}}),
]


def mutated(rng):
    """A sampler and a configuration whose options have strange values, one to three of them."""
    name = rng.choice(list(SAMPLERS))
    kind = getattr(diffusers, SAMPLERS[name].class_name)
    known = [key for key in inspect.signature(kind).parameters if key != "kwargs"] + sorted(STEP_ARGUMENTS) + ["mu"]
    return name, {rng.choice(known): rng.choice(STRANGE) for _ in range(rng.randint(1, 3))}


def check_mutated(seeds):
    """Each gives a table of finite numbers or is refused in one line, and refused the same way as an option."""
    made, lines = 0, []
    for seed in seeds:
        rng = random.Random(seed)
        name, strange = mutated(rng)
        count = rng.choice([1, 2, 7, 20])
        as_option = rng.random() < 0.5
        config, options = (dict(SD), strange) if as_option else ({**SD, **strange}, {})
        try:
            table = make_table(config, count, rng.choice([name, SAMPLERS[name].class_name]), options)
        except DiffoundryError as refusal:
            lines.append(str(refusal))
        else:
            assert np.isfinite(table.weights).all(), strange
            made += 1
    assert made
    assert lines
    assert not [line for line in lines if not 0 < len(line) < 500 or "\n" in line]


def test_mutated_configurations_give_a_table_or_one_line():
    check_mutated(range(150))


@pytest.mark.slow
def test_a_thousand_mutated_configurations_give_a_table_or_one_line():
    check_mutated(range(1000, 2000))


CONFIG = "scheduler/scheduler_config.json"


def vouched(bundle, text):
    """`bundle` with `text` as its scheduler configuration, whose hash its manifest tells."""
    (bundle / CONFIG).write_text(text)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"][CONFIG] = hashlib.sha256(text.encode()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize("count", [pytest.param(40, id="40"), pytest.param(1000, id="1000", marks=pytest.mark.slow)])
def test_mutated_configurations_of_a_bundle(copied, count):
    """Through the file of a bundle whose manifest vouches for it."""
    own = json.loads((copied / CONFIG).read_text())
    made, lines = 0, []
    for seed in range(2000, 2000 + count):
        name, strange = mutated(random.Random(seed))
        strange = {key: None if value == 10**5000 else value for key, value in strange.items()}  # no JSON reads it
        try:
            schedules = Schedules(Bundle.open(vouched(copied, json.dumps({**own, **strange}))))
            assert schedules.train_steps
            table = schedules.table(Steps(7), "txt2img", name)
        except DiffoundryError as refusal:
            lines.append(str(refusal))
        else:
            assert np.isfinite(table.weights).all(), strange
            made += 1
    assert made > count / 4
    assert len(lines) > count / 10
    assert not [line for line in lines if not 0 < len(line) < 1000 or "\n" in line or "was changed" in line]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("beta_start=nan", "beta_start"),
        ("use_karras_sigmas=maybe", "use_karras_sigmas"),
        ("trained_betas=[0.1,0.2]", "num_train_timesteps=1000 values, found 2"),
        ("solver_order=1e308", "solver_order"),
        ("num_train_timesteps=0", "num_train_timesteps"),
        ("timestep_spacing=[1]", "timestep_spacing"),
        ("steps_offset=-900", "steps_offset"),
        ("sigma_min=x", "sigma_min"),
    ],
)
def test_a_strange_scheduler_option_is_refused_in_one_line(called, bundle_of, tmp_path, option, says):
    picture = tmp_path / "a.png"
    more = ["--scheduler-option", "use_karras_sigmas=true"] if option.startswith("sigma_min") else []
    line = ["run", bundle_of("pico"), "a ring", "-o", picture, "--steps", 3, "--scheduler", "unipc"]
    refused = called(*line, *more, "--scheduler-option", option)
    assert refused.returncode == 1, refused
    assert refused.stderr.count("\n") == 1
    assert says in refused.stderr
    assert not picture.exists()


def test_arguments_of_step_are_not_read_from_a_configuration():
    """diffusers' pipelines pass 0 for eta whatever the file says, and leave the others to step()."""
    plain = make_table({**SD, "clip_sample": False}, 4, "ddim")
    told = make_table({**SD, "clip_sample": False, "eta": 1.0, "order": 2}, 4, "ddim")
    assert not told.draws.any()
    np.testing.assert_array_equal(told.weights, plain.weights)
    assert make_table({**SD, "clip_sample": False}, 4, "ddim", {"eta": 1.0}).draws.all()
