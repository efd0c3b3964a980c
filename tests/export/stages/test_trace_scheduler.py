"""Tables read off diffusers' own code: against our samplers, against its float32 runs, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace

import diffusers
import numpy as np
import pytest
import torch

from diffoundry.common.errors import BundleError, RequestError
from diffoundry.export.stages.trace_scheduler import impulse_responses, trace_scheduler, trace_scheduler_class
from diffoundry.parity.samplers import (
    LIMIT,
    SHAPE,
    TABLE_LIMIT,
    diffusers_trajectory,
    our_trajectory,
    step_options,
    table_error,
    variants,
    worst_error,
)
from diffoundry.runtime.schedulers import SAMPLERS, Steps, make_table
from diffoundry.runtime.schedulers.stored import from_json, load_table, save_table, to_json

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
CLASSES = [
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}, 3),
    ("DPMSolverMultistepScheduler", {**SD, **SDE, "use_karras_sigmas": True}, 2),
    ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3}, 2),
    ("DEISMultistepScheduler", {**SD, "solver_order": 3}, 3),
    ("UniPCMultistepScheduler", {**SD, "solver_order": 3}, 4),
    ("SASolverScheduler", SD, 3),
    ("HeunDiscreteScheduler", SD, 2),
    ("KDPM2DiscreteScheduler", SD, 2),
    ("KDPM2AncestralDiscreteScheduler", SD, 2),
    ("LMSDiscreteScheduler", SD, 4),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True}, 4),
    ("PNDMScheduler", SD, 5),
    ("IPNDMScheduler", {}, 4),
    ("EDMEulerScheduler", {}, 1),
    ("EDMDPMSolverMultistepScheduler", {}, 2),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 1),
    ("FlowMatchHeunDiscreteScheduler", {}, 2),
    ("FlowMatchLCMScheduler", {}, 1),
    ("LCMScheduler", SD, 1),
    ("TCDScheduler", SD, 1),
    ("DDIMInverseScheduler", {**SD, "clip_sample": False}, 1),
    ("DPMSolverMultistepInverseScheduler", SD, 2),
]
"""Class, config and the number of latents that it has to keep."""


@pytest.mark.parametrize("name", SAMPLERS)
def test_our_tables_are_those_of_diffusers(name):
    configs = [config for config in variants(SAMPLERS[name].class_name) if not config.get("clip_sample")]
    errors = []
    for chosen in np.random.default_rng(0).permutation(len(configs))[:2]:
        for steps in (Steps(1), Steps(13), Steps(9, start=4)):
            try:
                errors.append(table_error(name, configs[chosen], replace(steps, mu=configs[chosen].get("mu"))))
            except RequestError:  # what our sampler refuses is tested with it
                continue
    traced = [error for error in errors if not np.isnan(error)]  # NaN is what cannot be traced
    assert all(error < TABLE_LIMIT for error in traced), errors


@pytest.mark.parametrize(("name", "config", "registers"), CLASSES)
@pytest.mark.parametrize("start", [0, 4])
def test_a_traced_table_runs_as_diffusers_does(name, config, registers, start):
    scheduler = getattr(diffusers, name)(**config)
    if start and not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        pytest.skip("it noises no image")
    steps = Steps(14, start=start)
    table = trace_scheduler(scheduler, steps, **step_options(scheduler))
    assert table.registers == registers
    outputs = np.random.default_rng(1).standard_normal((table.steps + 1, *SHAPE)).astype(np.float32)
    expected = diffusers_trajectory(scheduler, steps, outputs, 3)
    assert worst_error(our_trajectory(table, steps, outputs, 3), expected) < LIMIT


@pytest.mark.parametrize("steps", [Steps(4, timesteps=(900, 500, 300, 20)), Steps(3, sigmas=(9.0, 4.0, 1.0, 0.0))])
def test_a_schedule_of_ones_own(steps):
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(timesteps=steps.timesteps and list(steps.timesteps), sigmas=steps.sigmas)
    np.testing.assert_array_equal(trace_scheduler(scheduler, steps).timesteps, scheduler.timesteps.numpy())


class Halving:
    """x' = x/2 + m/4 + m_before/8, noise of weight 1/16 at every second step."""

    def set_timesteps(self, count):
        self.timesteps = torch.arange(count, 0, -1)
        self.calls, self.before = 0, 0.0

    def step(self, model_output, timestep, sample, return_dict=True, gain=0.25):
        now = sample.to(torch.float32) / 2 + gain * model_output.float() + self.before / 8
        if self.calls % 2:
            now = now + torch.randn(sample.shape) / 16
        self.calls, self.before = self.calls + 1, model_output
        return (now.to(torch.float16),)


class Forgetting(Halving):
    def step(self, model_output, timestep, sample):
        return (sample * 0 if timestep == 3 else sample + model_output,)


class Squaring(Halving):
    def step(self, model_output, timestep, sample):
        return (sample + model_output**2 if timestep == 2 else sample,)


class Clamping(Halving):
    def step(self, model_output, timestep, sample):
        return ((sample + model_output).clamp(-5, 5),)


class Rolling(Halving):
    def step(self, model_output, timestep, sample):
        return (sample + torch.rand(sample.shape),)


class Restless(Halving):
    def step(self, model_output, timestep, sample):
        return (sample + torch.randn_like(sample) + torch.randn_like(sample),)


class Exploding(Halving):
    def step(self, model_output, timestep, sample):
        return (sample / (timestep - 2),)


class Failing(Halving):
    def set_timesteps(self, count):
        raise ValueError("too few steps\nfor me")


def test_a_scheduler_of_ones_own():
    table = trace_scheduler(Halving(), Steps(4))
    assert table.registers == 2
    assert table.draws.tolist() == [False, True, False, True]
    assert table.timesteps.tolist() == [4, 3, 2, 1]
    assert table.alpha_sigma.tolist() == [[1, 0]] * 4
    assert (table.init_scale, table.clip) == (1.0, np.inf)
    by_hand = [1 / 8, 1 / 16 + 1 / 16, 0, 1 / 8 + 1 / 8, 1 / 32, 1 / 4, 0, 0, 0]
    np.testing.assert_allclose(impulse_responses(table)[3], by_hand, rtol=0, atol=1e-15)


def test_a_state_that_is_nothing():
    table = trace_scheduler(Forgetting(), Steps(3))
    assert impulse_responses(table)[:, :5].tolist() == [[1, 0, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]


def test_step_arguments_and_the_scheduler_itself_are_kept_apart():
    scheduler = Halving()
    assert impulse_responses(trace_scheduler(scheduler, Steps(1), gain=3.0))[1].tolist() == [0.5, 3.0, 0.0]
    assert vars(scheduler) == {}
    euler = diffusers.EulerDiscreteScheduler(**SD)
    before = copy.deepcopy(vars(euler))
    trace_scheduler(euler, Steps(3))
    assert torch.get_default_dtype() == torch.float32
    assert euler.step_index is None and euler.sigmas.dtype == torch.float32
    assert set(vars(euler)) == set(before)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (Squaring(), "Squaring is not linear: at step 2"),
        (Clamping(), "Clamping is not linear: at step 0"),
        (Rolling(), "Rolling is not linear: at step 0"),
        (Restless(), "Restless cannot be traced: step 0 draws noise 2 times"),
        (Exploding(), "Exploding has no 4 finite steps"),
        (Failing(), "Failing cannot make 4 steps: too few steps$"),
        (object(), "object cannot be traced: it has no set_timesteps and no step"),
        (diffusers.DDIMScheduler(**SD), "DDIMScheduler is not linear"),
        (diffusers.DDPMScheduler(thresholding=True, clip_sample=False), "DDPMScheduler is not linear"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "DDPMScheduler cannot be traced, step 0 fails"),
        (diffusers.RePaintScheduler(), "RePaintScheduler cannot be traced, step 0 fails: .*missing"),
    ],
)
def test_what_is_no_table_is_refused(scheduler, says):
    with pytest.raises(RequestError, match=says):
        trace_scheduler(scheduler, Steps(4))


def test_a_class_by_name():
    config = {**SD, "_class_name": "Other", "steps_offset": 1, "clip_sample": False, "eta": 0.5, "unknown": 1}
    tables = trace_scheduler_class("DDIMScheduler", config, (2, 5))
    assert {count: table.steps for count, table in tables.items()} == {2: 2, 5: 5}
    ours = make_table({**SD, "steps_offset": 1, "clip_sample": False}, 5, "ddim")
    np.testing.assert_allclose(impulse_responses(tables[5]), impulse_responses(ours), atol=1e-9)


@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler"])
def test_eta_is_the_one_of_the_pipelines(name):
    """They pass 0, whatever the configuration or the default of step() says."""
    config = {**SD, "clip_sample": False, "eta": 0.5}
    traced = trace_scheduler_class(name, config, [3])[3]
    assert not traced.draws.any()
    np.testing.assert_allclose(impulse_responses(traced), impulse_responses(make_table(config, 3, name)), atol=1e-9)


def test_a_class_of_ones_own_by_name(tmp_path, monkeypatch):
    source = "import torch\nclass Mine:\n    def __init__(self, size=1.0, other=0):\n        self.size = size\n"
    source += "    def set_timesteps(self, n):\n        self.timesteps = torch.arange(n)\n"
    source += "    def step(self, m, t, x, **kwargs):\n        return (x + self.size * m,)\n"
    (tmp_path / "my_scheduler_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    table = trace_scheduler_class("my_scheduler_module:Mine", {"size": 3.0, "_class_name": "x"}, [1])[1]
    assert impulse_responses(table)[1].tolist() == [1.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("DDIMSchedular", {}, "did you mean 'DDIMScheduler'"),
        ("no_such_module:Mine", {}, "cannot be imported: No module named 'no_such_module'"),
        (":", {}, "cannot be imported"),
        ("json:dumps", {}, "is no class"),
        ("json:Dumps", {}, "named module:Class"),
        ("DDIMScheduler", {"beta_schedule": "none"}, "DDIMScheduler cannot be built .* none"),
    ],
)
def test_a_class_that_there_is_not(name, config, says):
    with pytest.raises(RequestError, match=says):
        trace_scheduler_class(name, config, [2])


def test_a_stored_table_comes_back_bit_for_bit(tmp_path):
    traced = trace_scheduler(diffusers.DPMSolverMultistepScheduler(**SD, **SDE), Steps(9))
    clipped = make_table({**SD, "clip_sample": True}, 4, "ddim")
    for table in (traced, clipped):
        save_table(tmp_path / "table.json", table)
        found = load_table(tmp_path / "table.json")
        for field in fields(table):
            expected, value = getattr(table, field.name), getattr(found, field.name)
            np.testing.assert_array_equal(value, expected)
            assert np.asarray(value).dtype == np.asarray(expected).dtype


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timesteps", []),
        ("timesteps", [1, 2]),
        ("timesteps", ["1", "2", "3"]),
        ("input_scale", [1, 2, float("nan")]),
        ("input_scale", [1, 2, 10**400]),
        ("weights", [[[1.0]]]),
        ("weights", [[[1.0], [2.0, 3.0]]]),
        ("weights", []),
        ("x0", [[1, 2, 3]] * 3),
        ("levels", None),
        ("draws", [0, 1, 0]),
        ("draws", [True]),
        ("init_scale", float("inf")),
        ("init_scale", "1"),
        ("init_scale", True),
        ("clip", -1),
        ("clip", [1.0]),
        ("extra", 1),
    ],
)
def test_a_damaged_table_is_named(tmp_path, name, value):
    stored = to_json(trace_scheduler(Halving(), Steps(3)))
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**stored, name: value}))
    with pytest.raises(BundleError, match=r"table\.json"):
        load_table(path)
    stored.pop(name, None)
    with pytest.raises(BundleError, match="here"):
        from_json({**stored, "more": 1}, "here")
