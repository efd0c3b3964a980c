"""The sums and means that diffusers' own scheduler tests expect of whole loops, out of our tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from diffoundry.runtime.loop.noise import TorchGenerator
from diffoundry.runtime.schedulers import Steps, make_table

LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LONG = LINEAR | {"num_train_timesteps": 1100}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
TO_SIGMA_MIN = LINEAR | {"final_sigmas_type": "sigma_min"}
DPM = TO_SIGMA_MIN | {"lower_order_final": False}
EDM_DPM = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
IMAGE = (4, 3, 8, 8)
ROW = (4, 3, 8)


class Loop(NamedTuple):
    """One of their loops, and the sum and mean of the magnitudes of its result.

    start: the first step, to which the sample is noised unless `noised` is False.
    off, total_off: how far from their figures is allowed, which are sometimes rounded or outdated; within the limits
    of theirs but for one, where diffusers' own float32 has lost the digits.
    """

    name: str
    config: dict[str, Any]
    total: float | None
    mean: float
    steps: int = 10
    start: int = 0
    noised: bool = True
    shape: tuple[int, ...] = IMAGE
    off: float = 1e-4
    total_off: float = 5e-4


LOOPS = [
    Loop("DDPMScheduler", LINEAR, 258.9606, 0.3372, 1000, total_off=2e-3),
    Loop("DDPMScheduler", LINEAR | V, 202.0296, 0.2631, 1000, total_off=2e-3),
    # diffusers divides two cumulative products in float32, which loses four digits of the last betas
    Loop("DDPMScheduler", LINEAR, 387.9466, 0.5051, 1000, start=998, total_off=3e-2),
    Loop("DDIMScheduler", LINEAR, 172.0067, 0.223967),
    Loop("DDIMScheduler", LINEAR | V, 52.5302, 0.0684),
    Loop("DDIMScheduler", LINEAR | {"beta_start": 0.01, "set_alpha_to_one": True}, 149.8295, 0.1951),
    Loop("DDIMScheduler", LINEAR | {"beta_start": 0.01, "set_alpha_to_one": False}, 149.0784, 0.1941),
    Loop("DDIMScheduler", LINEAR, 354.5418, 0.4616, start=8),
    Loop("PNDMScheduler", LINEAR, 198.1318, 0.2580),
    Loop("PNDMScheduler", LINEAR | V, 67.3986, 0.0878),
    Loop("PNDMScheduler", LINEAR | {"beta_start": 0.01, "set_alpha_to_one": True}, 230.0399, 0.2995, total_off=5e-3),
    Loop("PNDMScheduler", LINEAR | {"beta_start": 0.01, "set_alpha_to_one": False}, 186.9482, 0.2434, total_off=5e-3),
    Loop("LMSDiscreteScheduler", LONG, 1006.388, 1.31, off=5e-4),
    Loop("LMSDiscreteScheduler", LONG | V, 0.0017, 2.2676e-06),
    Loop("LMSDiscreteScheduler", LONG | KARRAS, 3812.9927, 4.9648),
    Loop("LMSDiscreteScheduler", LONG, 27663.6895, 36.0204, start=8),
    Loop("EulerDiscreteScheduler", LONG, 10.0807, 0.0131),
    Loop("EulerDiscreteScheduler", LONG | V, 0.0002, 2.2676e-06),
    Loop("EulerDiscreteScheduler", LONG | KARRAS, 124.52299499511719, 0.16213932633399963),
    Loop("EulerDiscreteScheduler", LONG, 57062.9297, 74.3007, start=8),
    Loop("EulerAncestralDiscreteScheduler", LONG, 152.3192, 0.1983),
    Loop("EulerAncestralDiscreteScheduler", LONG | V, 108.4439, 0.1412),
    Loop("EulerAncestralDiscreteScheduler", LONG, 56163.0508, 73.1290, start=8),
    Loop("HeunDiscreteScheduler", LONG, 0.1233, 0.0002),
    Loop("HeunDiscreteScheduler", LONG | V, 4.6934e-07, 6.1112e-10),
    Loop("HeunDiscreteScheduler", LONG | KARRAS, 0.00015, 1.9869554535034695e-07),
    Loop("HeunDiscreteScheduler", LONG, 75074.8906, 97.7538, start=8),
    Loop("KDPM2DiscreteScheduler", LONG, 20.4125, 0.0266),
    Loop("KDPM2DiscreteScheduler", LONG | V, 4.6934e-07, 6.1112e-10),
    Loop("KDPM2DiscreteScheduler", LONG, 70408.4062, 91.6776, start=8),
    Loop("KDPM2AncestralDiscreteScheduler", LONG, 13979.9433, 18.2030),
    Loop("KDPM2AncestralDiscreteScheduler", LONG | V, 331.8133, 0.4320),
    Loop("KDPM2AncestralDiscreteScheduler", LONG, 93087.3437, 121.2074, start=8),
    Loop("DPMSolverMultistepScheduler", DPM, None, 0.3301),
    Loop("DPMSolverMultistepScheduler", DPM | V, None, 0.2251),
    Loop("DPMSolverMultistepScheduler", DPM | V | KARRAS, None, 0.2096, off=5e-4),
    Loop("DPMSolverMultistepScheduler", DPM | V | {"use_lu_lambdas": True}, None, 0.1554),
    Loop("DPMSolverMultistepScheduler", DPM, 318.4111, 0.4146, start=5),
    Loop("DPMSolverSinglestepScheduler", TO_SIGMA_MIN, None, 0.2791),
    Loop("DPMSolverSinglestepScheduler", TO_SIGMA_MIN | KARRAS, None, 0.2248),
    Loop("DPMSolverSinglestepScheduler", TO_SIGMA_MIN | V, None, 0.1453),
    Loop("DPMSolverSinglestepScheduler", TO_SIGMA_MIN | V | KARRAS, None, 0.0649),
    Loop("DPMSolverSinglestepScheduler", TO_SIGMA_MIN, 269.2187, 0.3505, start=5),
    Loop("DPMSolverSinglestepScheduler", TO_SIGMA_MIN, None, 0.2574, 50, start=3, noised=False),
    Loop("DEISMultistepScheduler", LINEAR, None, 0.23916),
    Loop("DEISMultistepScheduler", LINEAR | V, None, 0.091),
    Loop("DEISMultistepScheduler", LINEAR, 315.3016, 0.41054, start=8),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN, None, 0.2464),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN | KARRAS, None, 0.2925),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN | V, None, 0.1014),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN | V | KARRAS, None, 0.1966, off=5e-4),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN, 315.5757, 0.4109, start=8),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN, None, 0.2441, shape=ROW),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN | KARRAS, None, 0.2898, shape=ROW),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN | V, None, 0.1014, shape=ROW, off=1e-3),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN | V | KARRAS, None, 0.1944, shape=ROW),
    Loop("UniPCMultistepScheduler", TO_SIGMA_MIN, 39.0870, 0.4072, start=8, shape=ROW),
    Loop("LCMScheduler", SD, 18.7097, 0.0244, 1),
    Loop("LCMScheduler", SD, 197.7616, 0.2575),
    Loop("TCDScheduler", SD | {"eta": 0.0}, 29.8715, 0.0389, 1),
    Loop("TCDScheduler", SD | {"eta": 0.0}, 181.2040, 0.2359),
    Loop("EDMEulerScheduler", {}, 34.1855, 0.044, off=1e-3),
    Loop("EDMDPMSolverMultistepScheduler", EDM_DPM, None, 0.0001),
    Loop("EDMDPMSolverMultistepScheduler", EDM_DPM | V, None, 0.0092),
    Loop("EDMDPMSolverMultistepScheduler", EDM_DPM, 8.1661, 0.0106, start=5),
    Loop("SASolverScheduler", LONG, 337.394287109375, 0.43931546807289124),
    Loop("SASolverScheduler", LONG | V, 193.1467742919922, 0.2514931857585907),
    Loop("SASolverScheduler", LONG | KARRAS, 837.2554931640625, 1.0901764631271362),
]


def ramp(shape):
    """Their sample: from 0 up to 1, the batch fastest."""
    count = np.prod(shape)
    return np.moveaxis(np.arange(count).reshape(*shape[1:], shape[0]) / count, -1, 0)


def run(table, registers, first=0, scaled_state=True):
    """The last registers of `table` from row `first` on, with their model m = x · t / (t + 1).

    Most of their loops step from the scaled sample instead of the sample.
    """
    generator, shape = TorchGenerator(0), registers.shape[1:]
    for k in range(first, table.steps):
        scaled, t = registers[0] * table.input_scale[k], table.timesteps[k]
        if scaled_state:
            registers[0] = scaled
        output = scaled * t / (t + 1)
        noise = generator.randn(*shape) if table.draws[k] else np.zeros(shape)
        x0 = np.clip(table.x0[k, 0] * registers[0] + table.x0[k, 1] * output, -table.clip, table.clip)
        registers = np.tensordot(table.weights[k], np.stack([*registers, output, noise, x0]), 1)
    return registers


def started(table, sample):
    registers = np.zeros((table.registers, *sample.shape))
    registers[0] = sample
    return registers


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_figures_of_diffusers(loop):
    table = make_table(loop.config, Steps(loop.steps, start=loop.start), loop.name)
    if loop.name == "EDMDPMSolverMultistepScheduler":  # the one loop of theirs that scales nothing
        table = replace(table, input_scale=np.ones(table.steps), init_scale=1.0)
    sample = ramp(loop.shape)
    x = sample * table.init_scale
    if loop.start and loop.noised:
        alpha, sigma = table.alpha_sigma[0]
        x = alpha * x + sigma * np.flip(sample)
    found = np.abs(run(table, started(table, x), scaled_state=loop.name != "EDMEulerScheduler")[0])
    assert found.mean() == pytest.approx(loop.mean, abs=loop.off)
    if loop.total is not None:
        assert found.sum() == pytest.approx(loop.total, abs=loop.total_off + 1e-6 * loop.total)


def test_figure_of_two_passes_of_ipndm():
    """The second pass goes on with the slopes of the first: the rows of a schedule that had three steps before it."""
    first = make_table({}, Steps(10), "IPNDMScheduler")
    betas = [*first.alpha_sigma[:, 1], 0.0]
    second = make_table({"trained_betas": betas[:3] + betas}, Steps(10), "IPNDMScheduler")
    registers = run(second, run(first, started(first, ramp(IMAGE))), first=3)
    assert np.abs(registers[0]).mean() == pytest.approx(2540529, abs=10)
