"""The pipeline's own promises: seeds, batches, guidance modes, callbacks, threads."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import diffoundry
from diffoundry.common.errors import BundleError, EngineError, RequestError, StoppedError
from diffoundry.runtime.loop.batch import Batch
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.loop.host import HostStepper
from diffoundry.runtime.loop.noise import TorchGenerator
from diffoundry.runtime.loop.sample import Sample
from diffoundry.runtime.pipeline import Request, load
from diffoundry.runtime.schedulers import make_table

PROMPT = "a large red star at the left on a navy background"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def pipe(bundle_of):
    return load(bundle_of("pico"))


@pytest.fixture(scope="module")
def untouched(bundle_of):
    """A pipeline that only gets requests that it refuses."""
    return load(bundle_of("pico"))


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
@pytest.mark.parametrize("batch", [None, 2])
def test_an_image_of_a_batch_equals_the_image_made_alone(pipe, sampler, batch):
    together = pipe(PROMPT, seed=5, count=3, steps=6, scheduler=sampler, batch=batch)
    assert together.seeds == [5, 6, 7]
    for i, seed in enumerate(together.seeds):
        alone = pipe(PROMPT, seed=seed, steps=6, scheduler=sampler)
        np.testing.assert_allclose(together.latents[i], alone.latents[0], atol=TOLERANCE)
        pixels = [np.asarray(image).astype(int) for image in (together.images[i], alone.images[0])]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_seed_zero_is_a_seed(pipe):
    first, second = (pipe(PROMPT, seed=0, steps=2) for _ in range(2))
    np.testing.assert_array_equal(first.latents, second.latents)
    assert first.seeds == [0]
    assert not np.allclose(first.latents, pipe(PROMPT, seed=1, steps=2).latents, atol=1e-2)


def test_no_seed_is_a_fresh_seed_that_is_told(pipe):
    first, second = (pipe(PROMPT, steps=2) for _ in range(2))
    assert first.seeds != second.seeds
    np.testing.assert_array_equal(pipe(PROMPT, steps=2, seed=first.seeds[0]).latents, first.latents)


def test_split_guidance_equals_joint(pipe):
    joint, split = (
        pipe(PROMPT, negative_prompt="a ring", seed=1, steps=5, guidance_mode=m) for m in ("joint", "split")
    )
    np.testing.assert_allclose(joint.latents, split.latents, atol=TOLERANCE)
    assert not np.allclose(joint.latents, pipe(PROMPT, seed=1, steps=5, guidance_mode="off").latents, atol=1e-2)


def test_guidance_of_one_is_off(pipe):
    one = pipe(PROMPT, seed=1, steps=4, guidance=1.0)
    off = pipe(PROMPT, seed=1, steps=4, guidance=7.5, guidance_mode="off")
    np.testing.assert_array_equal(one.latents, off.latents)


def test_the_guidance_interval_decides_which_steps_are_guided(pipe):
    def latents(interval):
        return pipe(PROMPT, seed=1, steps=4, guidance_interval=interval).latents

    np.testing.assert_array_equal(latents((0.0, 0.0)), pipe(PROMPT, seed=1, steps=4, guidance_mode="off").latents)
    np.testing.assert_array_equal(latents((0.0, 1.0)), pipe(PROMPT, seed=1, steps=4).latents)
    assert not np.allclose(latents((0.25, 0.75)), latents((0.0, 1.0)), atol=1e-3)
    assert [Guidance(7.5, interval=(0.25, 0.75)).at(k, 4) for k in range(4)] == [False, True, True, False]
    assert sum(Guidance(7.5, interval=(0, 0.28)).at(k, 25) for k in range(25)) == 7


def test_the_negative_prompt_changes_the_image(pipe):
    plain, negative = (pipe(PROMPT, seed=1, steps=4, negative_prompt=n).latents for n in ("", "a small ring"))
    assert not np.allclose(plain, negative, atol=1e-3)


def test_the_callback_sees_every_step_and_can_stop(pipe):
    seen = []
    pipe(PROMPT, seed=1, steps=3, count=2, batch=1, callback=lambda *step: seen.append(step[:2]))
    assert seen == [(k, 6) for k in range(1, 7)]
    with pytest.raises(StoppedError, match="after step 2 of 5"):
        pipe(PROMPT, seed=1, steps=5, callback=lambda k, total, latents: k < 2)
    with pytest.raises(StoppedError):
        pipe(PROMPT, seed=1, steps=5, callback=lambda *step: np.bool_(False))


def test_a_damaged_decoder_is_said_before_the_first_step(copied):
    with next(copied.glob("vae_decoder/fused.onnx")).open("ab") as file:
        file.write(b"x")
    pipe, steps = load(copied, engine="onnxruntime"), []
    with pytest.raises(BundleError, match=r"vae_decoder/fused\.onnx was changed"):
        pipe("a ring", steps=2, callback=lambda *step: steps.append(step))
    assert not steps
    assert not pipe.loaded
    assert pipe("a ring", steps=2, output="latent").latents.shape[0] == 1


def test_numbers_of_numpy_are_numbers(pipe):
    given = pipe(PROMPT, seed=np.int64(4), steps=np.int32(2), width=np.int64(64), guidance=np.float32(3))
    np.testing.assert_array_equal(given.latents, pipe(PROMPT, seed=4, steps=2, width=64, guidance=3).latents)


def test_two_threads_get_what_each_would_get_alone(pipe):
    wanted = {sampler: pipe(PROMPT, seed=3, steps=8, scheduler=sampler).latents for sampler in ("dpm++2m", "ddpm")}
    found = {}

    def work(sampler):
        found[sampler] = pipe(PROMPT, seed=3, steps=8, scheduler=sampler).latents

    threads = [threading.Thread(target=work, args=(sampler,)) for sampler in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sampler, latents in wanted.items():
        np.testing.assert_allclose(found[sampler], latents, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"count": True}, "count"),
        ({"seed": 2**64}, "seed must be a whole number from -9223372036854775808 to 18446744073709551615"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**64 - 2, "count": 3}, "choose a smaller seed, 18446744073709551613 at most"),
        ({"guidance_scale": 3, "guidance": 3}, "guidance_scale and guidance are two names of one option"),
        ({"num_inference_steps": 3, "steps": 3}, "two names of one option"),
        ({"mask_image": None, "mask": None}, "two names of one option"),
        ({"guidance_scael": 3}, "did you mean 'guidance_scale'"),
        ({"generator": None}, "give seed=, a whole number"),
        ({"num_images_per_prompt": 2}, "give count="),
        ({"output_type": "np"}, r"give output='image' or output='latent'; numpy.asarray\(image\)"),
        ({"eta": 0.5}, r"give scheduler_options=\{'eta'"),
        ({"callback_on_step_end": print}, "give callback=, a function of step, total and latents"),
        ({"latents": 1}, "give seed= for the noise"),
        ({"original_size": (64, 64)}, r"conditioning=diffoundry.Conditioning\(original_size=…\)"),
        ({"negative_crops_coords_top_left": (0, 0)}, r"negative_conditioning=diffoundry.Conditioning\(crop=…\)"),
        ({"ip_adapter_image": 1}, "give image_prompt=diffoundry.ImagePrompt"),
        ({"zzz": 1}, r"help\(diffoundry.Request\) lists all"),
        ({"negative_prompt": ["a"]}, "negative_prompt must be one text, found a list of 1: give the text"),
        ({"negative_prompt": ["a", "b"]}, "found a list of 2: run several in one batch with pipe.generate_many"),
        ({"weights": True, "negative_prompt": "[a]"}, r"negative_prompt, character 1: '\[a\]' lowers the weight"),
        ({"seed": 1.5}, "seed"),
        ({"width": 63}, "multiple of 8"),
        ({"height": 1 << 20}, "whole number from 1 to 16384"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance_mode": "both"}, "joint, split, off"),
        ({"guidance_interval": (0.5, 1.5)}, "interval"),
        ({"negative_prompt": 5}, "negative_prompt"),
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"batch": 0}, "batch"),
        ({"callback": 5}, "callback"),
        ({"seed": True}, "seed"),
        ({"width": float("nan")}, "width"),
        ({"guidance": "much"}, "guidance"),
        ({"guidance_interval": 0.5}, "interval"),
        ({"scheduler": 5}, "unknown scheduler"),
        ({"negative_prompt": "a ring", "guidance": 1}, "no effect"),
        ({"guidance_rescale": 2}, "rescale"),
        ({"rng": "mps"}, "unknown rng 'mps': choose one of cpu, cuda"),
        ({"timesteps": []}, "timesteps must be a list of numbers"),
        ({"timesteps": [999, 500], "sigmas": [3, 1]}, "give one of them"),
        ({"timesteps": [500, 999], "scheduler": "ddpm"}, "must descend"),
        ({"timesteps": [1e9], "scheduler": "ddpm"}, "past the 1000"),
        ({"timesteps": [float("nan")]}, "timesteps"),
        ({"scheduler_options": {"use_karas_sigmas": True}, "scheduler": "euler"}, "did you mean 'use_karras_sigmas'"),
        ({"scheduler_options": 5}, "scheduler_options"),
        ({"scheduler_options": {"eta": float("nan")}}, "finite numbers"),
        ({"scheduler": ["euler"]}, "unknown scheduler"),
        ({"rng": []}, "unknown rng"),
        ({"timesteps": "123"}, "timesteps must be a list"),
        ({"timesteps": [True, False]}, "timesteps must be a list"),
        ({"guidance": Guidance(3), "guidance_rescale": 0.5}, "as one Guidance"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_loaded(untouched, options, message):
    with pytest.raises(RequestError, match=message):
        untouched(PROMPT, **options)
    assert not untouched.loaded


def test_a_request_refuses_what_it_does_not_know_as_a_pipeline_does():
    with pytest.raises(RequestError, match=r"give guidance=diffoundry.Guidance\(…, rescale=…\)"):
        Request(PROMPT, guidance_rescale=0.5)
    with pytest.raises(RequestError, match="give seed="):
        Request(PROMPT, generator=torch.Generator())
    with pytest.raises(RequestError, match="two names of one option"):
        Request(PROMPT, guidance_scale=3, guidance=3)


def test_several_prompts_are_run_as_the_refusal_says(pipe):
    with pytest.raises(RequestError, match="found a list of 2") as caught:
        pipe(["a ring", "a star"])
    example = str(caught.value).partition(" with ")[2]
    first, second = eval(example, {"pipe": pipe, "diffoundry": diffoundry})
    np.testing.assert_allclose(first.latents, pipe("a ring", seed=1).latents, atol=TOLERANCE)
    np.testing.assert_allclose(second.latents, pipe("a star", seed=2).latents, atol=TOLERANCE)


def test_options_have_the_names_of_diffusers_too(pipe):
    small = {"seed": 1, "width": 32, "height": 32}
    wanted = pipe(PROMPT, steps=2, guidance=3.0, **small)
    found = pipe(PROMPT, num_inference_steps=2, guidance_scale=3.0, **small)
    request = Request(PROMPT, num_inference_steps=2, guidance_scale=3.0, **small)
    for result in (found, pipe.generate(request), pipe.generate(replace(request, scheduler=None))):
        np.testing.assert_array_equal(result.latents, wanted.latents)
        assert result.request == wanted.request
    grey = np.full((32, 32), 0.5, np.float32)
    both = [pipe(PROMPT, image=grey, steps=2, seed=1, **{name: grey}).latents for name in ("mask", "mask_image")]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**62 + 1, 2**63, 2**64 - 1])
def test_every_seed_of_torch_is_a_seed(pipe, seed):
    asked = {"steps": 1, "width": 32, "height": 32, "output": "latent"}
    found = pipe(PROMPT, seed=seed, scheduler="euler", guidance=1.0, **asked)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(TorchGenerator(seed).randn(1, 4, 4, 4), noise, atol=2e-6)
    low = pipe(
        PROMPT, seed=seed % 2**32, scheduler="euler", guidance=1.0, **asked
    )  # torch's CPU takes these bits alone
    np.testing.assert_array_equal(found.latents, low.latents)
    assert json.loads(json.dumps(found.request))["seed"] == seed
    assert found.seeds == [seed]
    two = pipe(PROMPT, seed=seed - (seed > 0), count=2, **asked)
    assert two.seeds == [seed - (seed > 0), seed + (seed < 0)]


def test_latents_that_are_not_finite_are_an_error(pipe):
    table = make_table({"steps_offset": 1}, 3, "euler")
    text = {"encoder_hidden_states": np.full((77, 64), np.nan, np.float32)}
    batch = Batch(HostStepper(pipe.engine("unet")))
    handle = batch.add(Sample(table, Guidance(3.0), TorchGenerator(0), text, text, np.zeros((4, 8, 8), np.float32)))
    batch.step(None)
    with pytest.raises(EngineError, match="not finite"):
        batch.take(handle)


def test_options_are_taken_as_they_are_when_the_request_is_made(pipe):
    betas = np.linspace(0.001, 0.01, 2000)
    other = np.where(np.arange(2000) // 500 % 3, betas * 3, betas)  # the same at both ends
    found = []
    for chosen in (betas, other):
        options = {"num_train_timesteps": 2000, "trained_betas": chosen}
        request = Request(PROMPT, seed=1, steps=3, scheduler="ddim", scheduler_options=options)
        options["trained_betas"] = None
        found.append(pipe.generate(request).latents)
    assert not np.allclose(*found, atol=1e-3)


def test_a_guidance_may_be_given_whole(pipe):
    whole = pipe(PROMPT, seed=1, steps=2, guidance=Guidance(3.0)).latents
    np.testing.assert_array_equal(whole, pipe(PROMPT, seed=1, steps=2, guidance=3.0).latents)


def test_the_record_of_a_result_makes_it_again(pipe):
    first = pipe(PROMPT, steps=3, guidance=3.0, guidance_mode="split")
    record = dict(first.request)
    guidance = Guidance(**record.pop("guidance"))
    again = pipe.generate(Request(guidance=guidance, **record))
    np.testing.assert_array_equal(first.latents, again.latents)


def test_the_largest_guidance_can_be_asked_for_where_one_is_added(copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["wiring"]["guidance_added"] = 1
    (copied / "bundle.json").write_text(json.dumps(manifest))
    pipe = load(copied)
    assert pipe.job(Request(PROMPT, guidance=1e6)).guidance.scale == 1_000_001
    with pytest.raises(RequestError, match=r"guidance must be a number from 0 to 1e\+06, found 2000000.0"):
        pipe.job(Request(PROMPT, guidance=2e6))
    assert not pipe.job(Request(PROMPT, guidance=0)).guidance.active
