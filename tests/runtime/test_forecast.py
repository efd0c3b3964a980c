"""Steps whose model output is forecast: exact where it drifts on a line, near elsewhere, the same on a device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import diffoundry
from diffoundry import Guidance, Request, RequestError
from diffoundry.calibration.quality import psnr
from diffoundry.runtime.loop.step import State
from diffoundry.runtime.pipeline import Pipeline, load
from diffoundry.runtime.schedulers import Steps, make_table
from diffoundry.runtime.schedulers.forecast import LEAST_STEPS, Pattern, with_forecasts
from diffoundry.tests.runtime.loop.test_stepping import OneByOne

PROMPT = "a large red star at the left on a navy background"
ASKED = {"seed": 3, "steps": 30, "guidance": 4.0}


@pytest.fixture(scope="module")
def pipe(bundle_of):
    return load(bundle_of("pico"), engine="onnxruntime", precision="fp32")


class Counted(OneByOne):
    """An engine that counts its calls."""

    def __init__(self, engine):
        super().__init__(engine)
        self.calls = 0

    def _bind_host(self, feeds, twice):
        bound = self._engine.bind_host(feeds, twice)

        def run(*changed):
            self.calls += 1
            return bound(*changed)

        return run


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m", "unipc", "deis", "lms", "dpm++2s"])
def test_an_output_on_a_line_is_forecast_exactly(pipe, sampler):
    rng = np.random.default_rng(0)
    start, offset, slope = (rng.standard_normal((4, 2, 2)).astype(np.float32) for _ in range(3))
    table = make_table(pipe.bundle.scheduler_config(), Steps(24), sampler)
    made = []
    for each in (table, with_forecasts(table)):
        state = State(each, start * np.float32(each.init_scale))
        while state.remaining:
            output = offset + slope * np.float32(state.timestep / 1000)
            state.advance(output if state.calls() else None)
        made.append(state.x.copy())
    assert np.abs(made[0] - made[1]).max() < 1e-4 * np.abs(made[0]).max()
    assert not np.array_equal(made[0], start)


def test_which_steps_call_the_model(pipe):
    table = make_table(pipe.bundle.scheduler_config(), Steps(21), "euler")
    assert table.calls.all()
    assert np.flatnonzero(with_forecasts(table).calls).tolist() == [0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19, 20]
    rare = with_forecasts(table, Pattern(first=5, every=4))
    assert np.flatnonzero(rare.calls).tolist() == [0, 1, 2, 3, 4, 8, 12, 16, 19, 20]


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m"])
def test_a_picture_is_nearer_than_that_of_fewer_steps(pipe, sampler):
    unet = Counted(pipe.engine("unet"))
    counted = Pipeline(pipe.bundle, engine="onnxruntime", threads=1, loop="host", engines={"unet": lambda: unet})
    asked = {**ASKED, "scheduler": sampler}
    whole = np.asarray(pipe(PROMPT, **asked).images[0])
    result = counted(PROMPT, **asked, forecast=True)
    calls = unet.calls
    assert calls == 17 and result.request["forecast"] is True and result.request["steps"] == 30
    fewer = np.asarray(counted(PROMPT, **{**asked, "steps": calls}).images[0])
    assert unet.calls == 2 * calls
    assert psnr(np.asarray(result.images[0]), whole) > max(45, psnr(fewer, whole) + 3)


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m", "euler_a", "unipc"])
def test_the_loop_on_a_device_goes_the_same_way(bundle_of, pipe, sampler):
    on_device = load(bundle_of("pico"), engine="onnxruntime", precision="fp32", loop="device")
    asked = {**ASKED, "steps": 20, "scheduler": sampler, "forecast": True, "output": "latent"}
    assert np.abs(pipe(PROMPT, **asked).latents - on_device(PROMPT, **asked).latents).max() < 5e-3


def test_rows_go_their_own_way_in_a_batch(pipe):
    requests = [
        Request(PROMPT, seed=1, steps=20, forecast=True),
        Request("a small ring", seed=2, steps=23),
        Request("a blue cross", seed=3, steps=25, forecast=True, scheduler="euler", guidance=Guidance(1)),
    ]
    together = pipe.generate_many([replace(each, output="latent") for each in requests])
    for request, result in zip(requests, together, strict=True):
        alone = pipe.generate(replace(request, output="latent"))
        assert np.abs(alone.latents - result.latents).max() < 2e-2


def test_a_part_of_a_schedule_is_forecast(pipe):
    image = pipe(PROMPT, seed=1, steps=10).images[0]
    asked = {"seed": 2, "steps": 40, "image": image, "strength": 0.6, "guidance": 4.0}
    whole, made = (np.asarray(pipe(PROMPT, **asked, forecast=each).images[0]) for each in (False, True))
    assert psnr(made, whole) > 40
    with pytest.raises(RequestError, match=f"a forecast needs {LEAST_STEPS} steps or more, found 16"):
        pipe(PROMPT, **{**asked, "strength": 0.4}, forecast=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 19}, "a forecast needs 20 steps or more, found 19: leave it out, or add steps"),
        ({"scheduler": "heun"}, "a forecast needs a scheduler with one model call a step, as euler: leave it out"),
        ({"scheduler": "kdpm2"}, "a forecast needs a scheduler with one model call a step, as euler: leave it out"),
        ({"scheduler": "pndm"}, "a forecast needs a scheduler with one model call a step, as euler: leave it out"),
        (
            {"scheduler": "ddpm", "scheduler_options": {"clip_sample": True}},
            "this scheduler clips what it predicts, which cannot be forecast: leave the forecast out",
        ),
        ({"guidance_interval": (0.2, 0.8)}, "a forecast needs guidance in all steps: leave the guidance interval out"),
        ({"forecast": 1}, "forecast must be true or false, found 1"),
    ],
)
def test_what_cannot_be_forecast_is_refused(pipe, options, message):
    with pytest.raises(RequestError, match=message):
        pipe(PROMPT, **{"seed": 1, "steps": 20, "forecast": True, **options})


def test_a_forecast_is_an_option_of_the_package():
    assert diffoundry.Request("x", forecast=True).forecast and not diffoundry.Request("x").forecast
