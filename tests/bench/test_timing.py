"""Calls that are timed, and the figures that are made of seconds."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from diffoundry.bench.report import Stages, Turn
from diffoundry.bench.timing import (
    Call,
    Recorder,
    TimedEngine,
    by_step,
    images_per_s,
    merged,
    percentile,
    ratio,
    rows_per_s,
    stages_of,
)
from diffoundry.engines.verify import recorded_case
from diffoundry.families import open_bundle
from diffoundry.runtime.pipeline import Pipeline
from diffoundry.runtime.request import Request

ROLES = {"text_encoder": "text", "unet": "denoiser", "vae_decoder": "decoder"}


def unet(start, end, rows=1, binds=False):
    return Call("unet", start, end, {"sample": (rows, 4, 8, 8), "timestep": (rows,)}, binds)


def test_percentiles_lie_between_values():
    values = list(range(1, 102))
    assert [percentile(values, share) for share in (50, 90, 95, 99)] == [51, 91, 96, 100]
    assert percentile([3.0], 99) == 3


def test_a_ratio_is_taken_pair_by_pair():
    found = ratio([2.0, 6.0, 40.0], [1.0, 2.0, 10.0])
    assert found.pairs == (2.0, 3.0, 4.0) and found.median == 3
    low, middle, high = statistics.quantiles(found.pairs, n=4, method="inclusive")
    assert (found.low, found.median, found.high) == (low, middle, high)
    assert ratio([], []) is None


def test_rates_are_of_the_median_turn():
    turns = [Turn(each, Stages(first_step=9.0, steps=(0.5, 0.1, 0.2))) for each in (1.0, 2.0, 9.0)]
    assert images_per_s(turns, count=4) == 2 and rows_per_s(turns, rows=8) == 40
    assert images_per_s([], 1) is None and rows_per_s([Turn(1.0)], 2) is None


def test_calls_at_once_take_from_the_first_start_to_the_last_end():
    found = merged([unet(1.0, 3.0), unet(1.5, 3.5), unet(0.5, 0.75, binds=True)])
    assert (found.start, found.end) == (0.5, 3.5)
    assert found.shapes == {"sample": (2, 4, 8, 8), "timestep": (2,)}
    assert merged([unet(0.0, 1.0, binds=True)]) is None


def test_each_call_belongs_to_its_step():
    calls = [unet(0.0, 0.9), unet(0.1, 1.0), unet(1.25, 2.0), unet(1.5, 2.25)]
    first, second = by_step(calls, [1.125, 2.5])
    assert (first.start, first.end, second.start, second.end) == (0.0, 1.0, 1.25, 2.25)


def test_the_stages_of_a_turn_fill_it():
    calls = [
        Call("text_encoder", 0.5, 1.0, {"input_ids": (2, 77)}),
        *(unet(1.5, 2.0, 2, binds=True), unet(2.0, 3.0, 2), unet(3.5, 4.0, 2)),
        Call("vae_decoder", 5.0, 5.75, {"latents": (1, 4, 8, 8)}),
    ]
    stages = stages_of(calls, ROLES, 0.0, [3.25, 4.5], 6.0, text=0.75)
    assert stages == Stages(
        before=1.5,
        first_step=1.75,
        steps=(1.25,),
        after=1.5,
        tokenize=0.25,
        text=0.5,
        denoiser=(1.5, 0.5),
        loop=(0.25, 0.75),
        decode=0.75,
    )
    assert stages.before + stages.first_step + sum(stages.steps) + stages.after == 6.0


def test_a_loop_that_is_not_seen_tells_no_steps():
    stages = stages_of([Call("text_encoder", 0.5, 1.0, {"input_ids": (2, 77)})], ROLES, 0.0, [], 6.0, text=0.75)
    assert stages == Stages(tokenize=0.25, text=0.5)


def test_an_engine_gives_what_it_gave_and_its_calls_are_seen(bundle_of):
    bundle, recorder = open_bundle(bundle_of("pico")), Recorder()
    plain = Pipeline(bundle)
    timed = Pipeline(bundle, wrap=lambda name, engine: TimedEngine(name, engine, recorder))
    feeds, _ = recorded_case(bundle, "unet")
    expected = plain.engine("unet")(feeds)
    for found in (timed.engine("unet")(feeds), timed.engine("unet").bind_host(feeds)()):
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    calls = recorder.take()
    assert [call.binds for call in calls] == [False, True, False] and recorder.take() == []
    assert all(call.component == "unet" and call.end > call.start for call in calls)
    assert calls[0].shapes == {name: array.shape for name, array in feeds.items()}
    engine = timed.engine("unet")
    tensors = {name: engine.to_device(array) for name, array in {**feeds, **expected}.items()}
    engine.bind_device(tensors)()
    assert all(np.array_equal(tensors[name].numpy(), expected[name]) for name in expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_wrapped_pipeline_draws_the_same_picture_with_as_many_calls_at_once(bundle_of, threads):
    """The rows of a small model run in a pool: the wrapped one keeps that."""
    bundle, recorder = open_bundle(bundle_of("pico")), Recorder()
    request = Request("a red star", steps=3, seed=7)
    plain = Pipeline(bundle, threads=threads).generate(request)
    timed = Pipeline(bundle, threads=threads, wrap=lambda name, engine: TimedEngine(name, engine, recorder))
    assert np.array_equal(np.asarray(timed.generate(request).images[0]), np.asarray(plain.images[0]))
    calls = [call for call in recorder.take() if call.component == "unet"]
    assert sum(not call.binds for call in calls) == 3 * threads
    assert {call.shapes["sample"][0] for call in calls} == {2 // threads}
