"""The loop on the device: what is kept from run to run gives what a run from nothing gives.

The GPU is played in host memory (`tests/engines/tensorrt/simulated.py` says what that proves); where it matters, the
same is asked of ONNX Runtime, whose engine of pico computes a part from the prompt ahead.
"""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from diffoundry.bundle import Bundle
from diffoundry.common.errors import EngineError, StoppedError
from diffoundry.engines.gpu.gpu import Gpu
from diffoundry.engines.tensorrt.engine import TensorRTEngine
from diffoundry.runtime.loaded import PLAIN
from diffoundry.runtime.loop import device
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.pipeline import Pipeline, Request, load
from diffoundry.tests.engines.tensorrt.simulated import write_plan

PROMPT = "a large red star at the left on a navy background"
TOLERANCE = 5e-3
"""Few steps of a sampler of high order magnify each rounding up to a thousand times; a wrong step shows in tenths."""
UNET = {
    "sample": ((1, 4, 4, 4), (2, 4, 8, 8), (16, 4, 16, 16)),
    "timestep": ((1,), (2,), (16,)),
    "encoder_hidden_states": ((1, 77, 64), (2, 77, 64), (16, 77, 64)),
}
STATIC = {
    "sample": ((2, 4, 8, 8),) * 3,
    "timestep": ((2,),) * 3,
    "encoder_hidden_states": ((2, 77, 64),) * 3,
}
SAMPLERS = ("euler", "dpm++2m", "pndm", "heun", "ddpm", "euler_a", "lcm")


def step_shapes(inputs):
    """Any batch up to 8, up to 4 registers, up to 64 steps."""
    sizes = {
        "calls": (1, 2, 16),
        "batch": (1, 1, 8),
        "registers": (1, 2, 6),
        "terms": (4, 5, 9),
        "channels": (4, 4, 4),
        "height": (4, 8, 16),
        "width": (4, 8, 16),
        "steps": (1, 20, 64),
        "steps_and_end": (2, 21, 65),
    }
    return {
        tensor.name: tuple(
            tuple(axis if isinstance(axis, int) else sizes[axis][i] for axis in tensor.shape) for i in range(3)
        )
        for tensor in inputs
    }


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return Bundle.open(bundle_of("pico"))


@pytest.fixture(scope="module")
def host(bundle):
    return load(bundle.root)


@pytest.fixture
def make(bundle, trt, tmp_path):
    """A pipeline whose U-Net and step run on the simulated GPU, from plans of these shapes."""

    def pipeline(*unet_shapes):
        gpu = Gpu()

        def engine(name, *shapes):
            component = bundle.component(name)
            plans = [
                write_plan(tmp_path / "engines", name, bundle.path(component.variant("fp32").model), part, name=f"p{i}")
                for i, part in enumerate(shapes)
            ]
            return TensorRTEngine(name, component.inputs, component.outputs, plans, gpu)

        step = step_shapes(bundle.component("step").inputs)
        engines = {"unet": lambda: engine("unet", *unet_shapes), "step": lambda: engine("step", step)}
        return Pipeline(bundle, loop="device", engines=engines)

    return pipeline


@pytest.fixture
def pipe(make):
    return make(UNET)


def assert_same(pipe, host, **options):
    found, wanted = (each(**{"prompt": PROMPT, "seed": 7, "steps": 6, **options}) for each in (pipe, host))
    np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)
    return found


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_it_gives_what_the_loop_on_the_host_gives(pipe, host, simulated_cuda, scheduler):
    runs = [assert_same(pipe, host, scheduler=scheduler, seed=seed).latents for seed in (7, 7, 8, 7)]
    # the first run is launched one by one, the second is captured
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 1
    assert simulated_cuda.calls["cudaGraphLaunch"] == 3
    for again in (runs[1], runs[3]):
        np.testing.assert_array_equal(runs[0], again)
    assert abs(runs[0] - runs[2]).max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1.0},
        {"guidance": 5.0, "guidance_rescale": 0.7, "negative_prompt": "a ring"},
        {"guidance_interval": (0.3, 0.7)},
        {"guidance_interval": (0.3, 0.7), "scheduler": "ddpm"},
        {"count": 3, "scheduler": "euler_a"},
        {"steps": 1},
        {"width": 96, "height": 64},
    ],
)
def test_every_kind_of_run_gives_the_same_each_time(pipe, host, options):
    for seed in (3, 4, 5):
        assert_same(pipe, host, **{**options, "seed": seed})


def test_rows_of_one_batch_may_differ(pipe, host):
    requests = [
        Request(PROMPT, seed=7, steps=8, scheduler="dpm++2m"),
        Request("a small ring", seed=9, steps=3, scheduler="ddpm", guidance=Guidance(4, interval=(0, 0.5)), count=2),
        Request("a star", seed=3, steps=11, scheduler="euler_a", guidance=Guidance(1.0)),
    ]
    wanted = host.generate_many(requests)
    for _ in range(3):
        for found, each in zip(pipe.generate_many(requests), wanted, strict=True):
            np.testing.assert_allclose(found.latents, each.latents, atol=TOLERANCE)


@pytest.mark.parametrize("scheduler", ["euler", "ddpm"])
def test_a_phase_that_is_used_again_takes_the_new_prompt(pipe, host, simulated_cuda, scheduler):
    prompts = [PROMPT, "a small blue ring", "a ring", "a ring", PROMPT]
    images = [assert_same(pipe, host, prompt=prompt, scheduler=scheduler).latents for prompt in prompts]
    assert not np.allclose(images[0], images[1], atol=0.1)
    np.testing.assert_array_equal(images[0], images[4])
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 1
    for guidance in (3.0, 9.0):
        assert_same(pipe, host, guidance=guidance, negative_prompt="a star", scheduler=scheduler)
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 1


def test_a_phase_that_is_used_again_takes_the_new_prompt_where_a_part_is_computed_ahead(bundle, host):
    assert bundle.component("unet").variant("fp32", "onnxruntime:cpu").per_prompt
    pipe = load(bundle.root, loop="device")
    for prompt in (PROMPT, "a small blue ring", "a ring", PROMPT):
        assert_same(pipe, host, prompt=prompt)
    assert len(pipe._engines._phases[PLAIN]._idle) == 1


def test_two_shapes_in_turn(pipe, host, simulated_cuda):
    for turn in range(3):
        for width in (64, 96):
            assert_same(pipe, host, width=width, seed=turn)
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 2


def test_a_plan_for_two_rows_serves_one(make, host, trt):
    pipe = make(STATIC)
    for seed in (1, 2, 3):
        assert_same(pipe, host, guidance=1.0, seed=seed)
        assert_same(pipe, host, seed=seed)
        assert_same(pipe, host, guidance=1.0, seed=seed, callback=lambda *step: None)
    assert {run[1]["sample"] for run in trt.runs if run[0] == "unet"} == {(2, 4, 8, 8)}
    with pytest.raises(EngineError, match="no plan takes sample 4x4x8x8"):
        pipe(PROMPT, count=2, steps=2)


def test_nothing_crosses_the_bus_between_steps(pipe, simulated_cuda):
    for run in range(3):
        simulated_cuda.copied.clear()
        pipe(PROMPT, seed=run, steps=20, scheduler="euler")
    latents = 4 * 8 * 8 * 4
    assert simulated_cuda.copied["cudaMemcpyDeviceToHost"] == latents  # the final ones
    # latents, two rows of model input with their timesteps, the position; no table, no embedding
    assert simulated_cuda.copied["cudaMemcpyHostToDevice"] == latents + 2 * (latents + 4) + 8
    simulated_cuda.copied.clear()
    mallocs = simulated_cuda.calls["cudaMalloc"]
    pipe("another prompt", seed=3, steps=20, scheduler="euler")
    assert simulated_cuda.copied["cudaMemcpyHostToDevice"] == 3 * latents + 16 + 2 * 77 * 64 * 4
    assert simulated_cuda.calls["cudaMalloc"] == mallocs


@pytest.mark.parametrize("scheduler", ["euler", "ddpm"])
def test_a_callback_sees_each_step_and_can_stop(pipe, host, simulated_cuda, scheduler):
    for seed in (1, 2):
        seen = {}
        for name, each in (("device", pipe), ("host", host)):
            kept = seen.setdefault(name, [])
            each(PROMPT, seed=seed, steps=6, scheduler=scheduler, callback=lambda *step, kept=kept: kept.append(step))
        assert [step[:2] for step in seen["device"]] == [(k, 6) for k in range(1, 7)]
        for found, wanted in zip(seen["device"], seen["host"], strict=True):
            np.testing.assert_allclose(found[2], wanted[2], atol=TOLERANCE)
        with pytest.raises(StoppedError, match="after step 3 of 6"):
            pipe(PROMPT, seed=1, steps=6, scheduler=scheduler, callback=lambda k, total, latents: k < 3)
    # a stopped run gives back what it used, and both ways of running share the tensors
    assert_same(pipe, host, scheduler=scheduler)
    assert len(pipe._engines._phases[PLAIN]._idle) == 1
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 2  # one for each turn of the registers


def test_noise_that_is_too_much_at_once_is_sent_step_by_step(pipe, host, simulated_cuda, monkeypatch):
    monkeypatch.setattr(device, "_MOST_NOISE_BYTES", 5 * 4 * 8 * 8 * 4)
    for seed in (1, 2):
        assert_same(pipe, host, scheduler="ddpm", seed=seed)  # draws in five of six steps
    assert simulated_cuda.calls["cudaGraphLaunch"] == 1
    monkeypatch.setattr(device, "_MOST_NOISE_BYTES", 5 * 4 * 8 * 8 * 4 - 1)
    before = simulated_cuda.calls["cudaGraphLaunch"]
    assert_same(pipe, host, scheduler="ddpm", seed=3)
    assert simulated_cuda.calls["cudaGraphLaunch"] == before + 4


def test_only_so_many_phases_are_kept(pipe, host, simulated_cuda, monkeypatch):
    monkeypatch.setattr(device, "_MOST_PHASES", 2)
    for _ in range(2):
        assert_same(pipe, host)
    kept = simulated_cuda.used
    for steps in (2, 3, 4, 5, 6, 6):
        assert_same(pipe, host, steps=steps)
        assert len(pipe._engines._phases[PLAIN]._idle) <= 2
    assert simulated_cuda.used < 3 * kept
    assert len(simulated_cuda.graphs) == 1


@pytest.mark.parametrize("name", ["unet", "step", None])
def test_releasing_an_engine_gives_its_memory_back(pipe, host, simulated_cuda, name):
    assert_same(pipe, host)
    assert_same(pipe, host)
    gc.collect()
    gc.disable()
    try:
        if name is None:
            pipe.release_all()
        else:
            pipe.release(name)
            other = "step" if name == "unet" else "unet"
            assert not simulated_cuda.graphs
            pipe.release(other)
        assert not simulated_cuda.graphs
        assert len(simulated_cuda.blocks) <= 1  # the arena, as long as the GPU is open
    finally:
        gc.enable()
    assert_same(pipe, host)


def test_an_engine_that_is_released_during_a_run_is_not_kept(pipe, host):
    pipe(PROMPT, steps=3, callback=lambda *step: pipe.release("unet"))
    assert pipe._engines._phases == {}
    assert_same(pipe, host, steps=3)
    assert len(pipe._engines._phases[PLAIN]._idle) == 1


def test_an_engine_that_fails_is_not_run_with_what_it_left(pipe, host, trt, monkeypatch):
    assert_same(pipe, host)
    trt.cuda.memory = trt.cuda.used
    with pytest.raises(EngineError, match="out of GPU memory"):
        pipe(PROMPT, steps=7)
    trt.cuda.memory = 1 << 30
    with monkeypatch.context() as broken:

        def fail(*step):
            broken.setattr(type(trt.contexts[0]), "execute_async_v3", lambda context, stream: False)

        with pytest.raises(EngineError, match="TensorRT did not run it"):
            pipe(PROMPT, steps=6, callback=fail)
    assert not pipe._engines._phases[PLAIN]._idle
    assert_same(pipe, host)


def test_latents_that_overflow_are_refused(make, bundle, monkeypatch):
    pipe = make(UNET)
    real = device._contents

    def poisoned(*args):
        contents, texts = real(*args)
        texts["encoder_hidden_states"] = np.full_like(texts["encoder_hidden_states"], np.nan)
        return contents, texts

    monkeypatch.setattr(device, "_contents", poisoned)
    with pytest.raises(EngineError, match="the final latents are not finite"):
        pipe(PROMPT, steps=3)


def test_threads_do_not_share_what_they_run_in(pipe, host):
    wanted = {seed: host(PROMPT, seed=seed, steps=5, scheduler="ddpm").latents for seed in range(4)}
    found = {}

    def work(seed):
        for _ in range(3):
            found.setdefault(seed, []).append(pipe(PROMPT, seed=seed, steps=5, scheduler="ddpm").latents)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, latents in wanted.items():
        assert len(found[seed]) == 3
        for each in found[seed]:
            np.testing.assert_allclose(each, latents, atol=TOLERANCE)


def test_a_run_within_a_callback_does_not_disturb_it(pipe, host):
    inner = []

    def callback(k, total, latents):
        if k == 2:
            inner.append(pipe("a ring", seed=1, steps=4, callback=lambda *step: None).latents)

    for _ in range(2):
        assert_same(pipe, host, steps=4, callback=callback)
    np.testing.assert_allclose(inner[1], host("a ring", seed=1, steps=4).latents, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "message"), [("unet", "must lie on its GPU"), ("step", "must be ONNX Runtime's")])
def test_engines_of_two_kinds_cannot_be_bound_together(bundle, make, name, message):
    on_gpu = make(UNET)
    pipe = Pipeline(bundle, loop="device", engines={name: lambda: on_gpu.engine(name)})
    with pytest.raises(EngineError, match=f"unet: what is bound to it {message}: load all parts for one engine"):
        pipe(PROMPT, steps=2)


def test_a_run_leaves_no_graph_that_points_to_memory_that_is_gone(pipe, host, simulated_cuda):
    for _ in range(3):
        assert_same(pipe, host)
    moved = simulated_cuda.calls["cudaGraphInstantiate"]
    assert_same(pipe, host, count=4)  # its activations take more: the arena moves
    for _ in range(3):
        assert_same(pipe, host)
    assert simulated_cuda.calls["cudaGraphInstantiate"] == moved + 1
    assert simulated_cuda.illegal == ""
