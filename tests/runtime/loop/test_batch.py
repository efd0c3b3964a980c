"""Rows of one batch that differ in sampler, steps, guidance and seed; the loop on the host and on the device."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.common.errors import BundleError, EngineError, RequestError, StoppedError
from diffoundry.runtime.loop.batch import Batch
from diffoundry.runtime.loop.guidance import Guidance, combine
from diffoundry.runtime.loop.host import HostStepper
from diffoundry.runtime.loop.noise import TorchGenerator
from diffoundry.runtime.loop.sample import Sample
from diffoundry.runtime.loop.step import State, step_inputs
from diffoundry.runtime.pipeline import Request, load
from diffoundry.runtime.schedulers import make_table

PROMPT = "a large red star at the left on a navy background"
TOLERANCE = 2e-4
MIXED = [
    Request(PROMPT, seed=7, steps=8, scheduler="dpm++2m"),
    Request("a small ring", seed=9, steps=3, scheduler="ddpm", guidance=Guidance(4, interval=(0, 0.5)), count=2),
    Request("a star", seed=3, steps=11, scheduler="euler_a", guidance=Guidance(1.0)),
    Request(PROMPT, negative_prompt="a ring", seed=7, steps=6, scheduler="heun", guidance=Guidance(5, rescale=0.7)),
    Request(PROMPT, seed=7, steps=5, scheduler="ddim", scheduler_options={"clip_sample": True, "eta": 0.5}),
]


@pytest.fixture(scope="module")
def pipe(bundle_of):
    return load(bundle_of("pico"))


@pytest.fixture(scope="module")
def device_pipe(bundle_of):
    return load(bundle_of("pico"), loop="device")


@pytest.fixture(scope="module")
def alone(pipe):
    return [pipe.generate(request) for request in MIXED]


def test_rows_of_a_mixed_batch_are_what_they_are_alone(pipe, alone):
    together = pipe.generate_many(MIXED)
    for found, wanted in zip(together, alone, strict=True):
        assert found.seeds == wanted.seeds
        assert found.request == wanted.request
        np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)
    assert len({result.latents.tobytes() for result in together}) == len(MIXED)


def test_a_mixed_batch_may_be_cut_into_calls_of_any_size(pipe, alone):
    for found, wanted in zip(pipe.generate_many(MIXED, batch=2), alone, strict=True):
        np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)


def test_rows_shared_among_processors_are_what_they_are_on_one(bundle_of, alone):
    for threads in (1, 2, 3):
        results = load(bundle_of("pico"), threads=threads).generate_many(MIXED)
        for found, wanted in zip(results, alone, strict=True):
            np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)


def test_the_loop_on_the_device_gives_the_same(device_pipe, alone):
    for request, wanted in zip(MIXED, alone, strict=True):
        np.testing.assert_allclose(device_pipe.generate(request).latents, wanted.latents, atol=TOLERANCE)
    for found, wanted in zip(device_pipe.generate_many(MIXED), alone, strict=True):
        np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)


def test_the_loop_on_the_device_reports_and_stops(pipe, device_pipe):
    seen = {"host": [], "device": []}
    for name, each in (("host", pipe), ("device", device_pipe)):
        each(PROMPT, seed=1, steps=3, callback=lambda *step, name=name: seen[name].append(step))
    assert [step[:2] for step in seen["device"]] == [(1, 3), (2, 3), (3, 3)]
    for found, wanted in zip(seen["device"], seen["host"], strict=True):
        np.testing.assert_allclose(found[2], wanted[2], atol=TOLERANCE)
    with pytest.raises(StoppedError, match="after step 2 of 5"):
        device_pipe(PROMPT, seed=1, steps=5, callback=lambda k, total, latents: k < 2)


def test_the_device_loop_needs_the_step_graph(bundle_of, copied):
    import json

    with pytest.raises(RequestError, match="host, device"):
        load(bundle_of("pico"), loop="moon")
    manifest = json.loads((copied / "bundle.json").read_text())
    del manifest["components"]["step"]
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no step graph: compile it again"):
        load(copied, loop="device")
    assert load(copied)(PROMPT, steps=1, seed=1).images


def test_requests_of_one_batch_have_one_size(pipe):
    with pytest.raises(RequestError, match="one size"):
        pipe.generate_many([Request(PROMPT), Request(PROMPT, width=72)])
    with pytest.raises(RequestError, match="from 1 to"):
        pipe.generate_many([])
    for odd in (None, "abc", [None], Request(PROMPT)):
        with pytest.raises(RequestError, match="list of Request"):
            pipe.generate_many(odd)


def test_the_device_loop_refuses_split_guidance(device_pipe):
    with pytest.raises(RequestError, match="joint guidance"):
        device_pipe(PROMPT, steps=2, guidance_mode="split")


def test_links_are_checked(device_pipe):
    engine = device_pipe.engine("vae_decoder")
    with pytest.raises(EngineError, match="nothing was bound to latent_sample, sample"):
        engine.bind_device({})
    name = engine.inputs[0].name
    wrong = {name: engine.to_device(np.zeros((1, 3, 8, 8), np.float32))}
    with pytest.raises(EngineError, match=f"input '{name}' must be"):
        engine.bind_device({**wrong, engine.outputs[0].name: engine.to_device(np.zeros((1, 3, 64, 64), np.float32))})


def test_steps_go_in_one_piece_until_a_row_ends_or_its_guidance_changes(pipe):
    def sample(steps, interval=(0.0, 1.0)):
        table = make_table({"steps_offset": 1}, steps, "euler")
        text = {"encoder_hidden_states": np.zeros((77, 64), np.float32)}
        guidance = Guidance(5, interval=interval)
        return Sample(table, guidance, TorchGenerator(0), text, text, np.zeros((4, 8, 8), np.float32))

    batch = Batch(HostStepper(pipe.engine("unet")))
    first, second = batch.add(sample(4)), batch.add(sample(6, (0, 0.5)))
    found = []
    while batch:
        found.append((batch.step(None), batch.done))
    assert found == [(3, ()), (1, (first,)), (2, (first, second))]
    assert batch.step() == 0


def test_padding_changes_no_number(pipe):
    """The `step` graph gives a row beside rows of more registers and steps what the host gives it alone."""
    tables = [make_table({"steps_offset": 1}, 5 + i, name) for i, name in enumerate(("euler", "heun", "pndm", "deis"))]
    rng = np.random.default_rng(0)
    latents, output, noise = rng.standard_normal((3, len(tables), 4, 8, 8)).astype(np.float32)
    states = [State(table, x) for table, x in zip(tables, latents, strict=True)]
    rows = np.arange(len(tables))
    beside = {"prompt_row": rows, "negative_row": rows, "source": rows}
    scales = {"guidance": np.ones(len(tables), np.float32), "rescale": np.zeros(len(tables), np.float32)}
    for _ in range(4):
        feeds = {**step_inputs(states), **beside, **scales, "model_output": output, "noise": noise}
        found = pipe.engine("step")(feeds)
        for i, state in enumerate(states):
            state.advance(output[i], noise[i])
            own = found["next_registers"][i, : state.table.registers]
            np.testing.assert_allclose(own, state.registers, atol=1e-5)
            np.testing.assert_allclose(found["sample"][i], state.model_input(), atol=1e-5)


def test_guidance_rescale_is_that_of_diffusers():
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    prompt, negative = (np.random.default_rng(i).standard_normal((3, 4, 8, 8)).astype(np.float32) for i in (1, 2))
    found = combine(prompt, negative, [Guidance(7.5, rescale=phi) for phi in (0.0, 0.7, 1.0)])
    plain = torch.from_numpy(negative + 7.5 * (prompt - negative))
    for i, phi in enumerate((0.0, 0.7, 1.0)):
        wanted = rescale_noise_cfg(plain[i : i + 1], torch.from_numpy(prompt[i : i + 1]), guidance_rescale=phi)
        np.testing.assert_allclose(found[i], wanted[0].numpy(), rtol=1e-5, atol=1e-5)


def test_a_row_that_is_paused_goes_on_as_if_it_had_not_been(pipe, device_pipe, alone):
    for each in (pipe, device_pipe):
        ready = each.prepare([each.job(MIXED[0]), each.job(MIXED[2])])
        batch = each.batch(ready[0])
        first, second = (batch.add(one.samples[0]) for one in ready)
        for _ in range(3):
            batch.step()
        row = batch.pause(first)
        with pytest.raises(RequestError, match="no row"):
            batch.drop(first)
        while batch:
            batch.step()
        with pytest.raises(RequestError, match="take it"):
            batch.pause(second)
        other = each.batch(ready[0])
        again = other.resume(row)
        while other:
            other.step()
        np.testing.assert_allclose(other.take(again), alone[0].latents[0], atol=TOLERANCE)
        np.testing.assert_allclose(batch.take(second), alone[2].latents[0], atol=TOLERANCE)


def test_jobs_are_prepared_together_whatever_they_are(pipe, alone):
    several = [*MIXED, Request("a ring", seed=1, steps=2, width=96), Request("a " * 200, windows=True, seed=1, steps=2)]
    ready = pipe.prepare([pipe.job(request) for request in several])
    assert len({pipe.group(each) for each in ready}) == 3
    batch = pipe.batch(ready[0])
    handles = [batch.add(sample) for one in ready[: len(MIXED)] for sample in one.samples]
    while batch:
        batch.step()
    wanted = [latents for result in alone for latents in result.latents]
    for handle, latents in zip(handles, wanted, strict=True):
        np.testing.assert_allclose(batch.take(handle), latents, atol=TOLERANCE)
    image = pipe.picture(ready[0].job, alone[0].latents[0])
    assert np.array_equal(np.asarray(image), np.asarray(alone[0].images[0]))
