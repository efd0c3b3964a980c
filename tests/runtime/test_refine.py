"""Two models that share a schedule."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry import Conditioning, Request, load
from diffoundry.common.errors import RequestError
from diffoundry.runtime.refine import generate_refined

PROMPT = "a lighthouse at dusk"


@pytest.fixture(scope="module")
def base(bundle_of):
    return load(bundle_of("sdxl-small"))


@pytest.fixture(scope="module")
def refiner(bundle_of):
    return load(bundle_of("sdxl-refiner-small"))


def test_the_refiner_runs_the_rest_of_the_schedule(base, refiner):
    calls = []
    options = {"negative_prompt": "fog", "prompt_2": "oil on canvas", "seed": 3, "steps": 6}
    result = generate_refined(
        base,
        refiner,
        Request(PROMPT, count=2, **options),
        0.5,
        callback=lambda step, total, _: calls.append((step, total)),
    )
    begun = base(PROMPT, count=2, denoising_end=0.5, **options).latents
    expected = refiner(PROMPT, image=begun, denoising_start=0.5, **options).latents
    np.testing.assert_array_equal(result.latents, expected)
    assert np.abs(expected - begun).max() > 0.1
    assert len(calls) == 6
    assert (result.seeds, len(result.images), result.request["refined_from"]) == ([3, 4], 2, 0.5)


@pytest.mark.parametrize(
    ("options", "part", "message"),
    [
        ({"denoising_end": 0.5}, 0.8, "shares the schedule by itself"),
        ({}, 1.5, "must be between 0 and 1, found 1.5"),
        ({}, 0.999, "leaves no step"),
        ({"decoder": "tiny"}, 0.8, "no tiny decoder"),
    ],
)
def test_what_the_refiner_cannot_do_is_said_before_the_base_runs(base, refiner, options, part, message):
    ran = []
    with pytest.raises(RequestError, match=message):
        generate_refined(base, refiner, Request(PROMPT, steps=4, **options), part, callback=ran.append)
    assert not ran


def test_a_model_of_other_latents_does_not_refine(base, bundle_of):
    with pytest.raises(RequestError, match=r"does not refine .* the scaling_factor of its latents"):
        generate_refined(base, load(bundle_of("pico")), Request(PROMPT, steps=4))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("base", {"conditioning": Conditioning(aesthetic_score=1)}, "aesthetic_score has no effect on this model"),
        ("refiner", {"conditioning": Conditioning(target_size=(7, 7))}, "target_size has no effect on this model"),
        ("base", {"prompt_embeds": np.zeros((77, 5))}, "prompt_embeds must be 80 wide"),
    ],
)
def test_options_that_a_model_does_not_heed_are_refused(base, refiner, name, options, message):
    pipe = {"base": base, "refiner": refiner}[name]
    latents = np.zeros((1, 4, 8, 8), np.float32)
    prompt = "" if "prompt_embeds" in options else PROMPT
    image = {"image": latents} if name == "refiner" else {}
    pooled = {"pooled_prompt_embeds": np.zeros(40)} if "prompt_embeds" in options else {}
    with pytest.raises(RequestError, match=message):
        pipe(prompt, steps=2, **image, **options, **pooled)


def test_an_ordinary_model_may_refine_and_an_image_may_be_refined(base):
    request = Request(PROMPT, seed=3, steps=6, scheduler="ddim")
    whole = base.generate(request)
    np.testing.assert_allclose(generate_refined(base, base, request, 0.5).latents, whole.latents, atol=1e-5)
