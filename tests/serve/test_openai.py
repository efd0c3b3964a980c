"""Every call of OpenAI's images API by its official client, against a server that listens."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image

from diffoundry import Guidance, Request
from diffoundry.tests.serve.conftest import picture, png, serving, until

PROMPT = "a large red star at the left on a navy background"
FAST = {"seed": 7, "steps": 3}
NEAR = 1
"""A row may be rounded otherwise beside others."""


@pytest.fixture
def client(idle):
    with idle.client() as made:
        yield made


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe.generate(Request(PROMPT, **FAST)).images[0]


def near(found, wanted):
    assert np.abs(found.astype(int) - np.asarray(wanted).astype(int)).max() <= NEAR


def refused(error, call):
    with pytest.raises(error) as found:
        call()
    return found.value


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object) == ("pico", "model")
    assert model.model_extra["diffoundry"]["tasks"] == ["txt2img", "img2img", "inpaint"]
    assert client.models.retrieve("pico") == model
    assert refused(openai.NotFoundError, lambda: client.models.retrieve("other")).code == "model_not_found"


def test_generate(client, drawn, pipe):
    made = client.images.generate(model="pico", prompt=PROMPT, n=2, size="64x64", extra_body=FAST)
    near(picture(made.data[0].b64_json), drawn)
    near(picture(made.data[1].b64_json), pipe.generate(Request(PROMPT, seed=8, steps=3)).images[0])
    assert (made.size, made.background, made.output_format) == ("64x64", "opaque", "png")
    usage = made.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (77, 2 * 64, 77 + 2 * 64)
    chunk = json.loads(Image.open(io.BytesIO(base64.b64decode(made.data[1].b64_json))).info["diffoundry"])
    assert (chunk["prompt"], chunk["seed"], chunk["steps"], chunk["model"]) == (PROMPT, 8, 3, "pico")


def test_the_fields_of_a_request_go_in_the_extra_body(client, pipe):
    options = {"seed": 3, "steps": 4, "scheduler": "euler_a", "negative_prompt": "a ring", "width": 96, "height": 64}
    extra = {**options, "guidance": 4, "guidance_interval": [0, 0.6], "scheduler_options": {"eta": 0.5}}
    made = client.images.generate(prompt=PROMPT, extra_body={**extra, "scheduler": "ddim"})
    guidance = Guidance(4, interval=(0, 0.6))
    wanted = Request(PROMPT, **{**options, "scheduler": "ddim"}, guidance=guidance, scheduler_options={"eta": 0.5})
    near(picture(made.data[0].b64_json), pipe.generate(wanted).images[0])
    again = client.images.generate(
        prompt=PROMPT, size="96x64", extra_body={"num_inference_steps": 2, "guidance_scale": 2}
    )
    request = again.model_extra["diffoundry"]["request"]
    assert (request["width"], request["steps"], request["guidance"]["scale"]) == (96, 2, 2)


def test_rows_that_share_a_batch_are_what_they_are_alone(client, pipe):
    requests = [
        {"prompt": PROMPT, "seed": 7, "steps": 9, "scheduler": "dpm++2m"},
        {"prompt": "a small ring", "seed": 9, "steps": 3, "scheduler": "ddpm", "guidance": 4},
        {"prompt": "a star", "seed": 3, "steps": 12, "scheduler": "euler_a", "guidance": 1},
        {"prompt": "a heart", "seed": 5, "steps": 5, "scheduler": "heun", "guidance": 5},
        {"prompt": "a heart", "seed": 5, "steps": 5, "width": 96, "height": 64},
    ]

    def ask(options):
        prompt = options["prompt"]
        extra = {name: value for name, value in options.items() if name != "prompt"}
        return client.images.generate(prompt=prompt, extra_body=extra).data[0].b64_json

    with ThreadPoolExecutor(len(requests)) as pool:
        found = list(pool.map(ask, requests))
    for data, options in zip(found, requests, strict=True):
        guidance = {"guidance": Guidance(options.pop("guidance"))} if "guidance" in options else {}
        near(picture(data), pipe.generate(Request(**options, **guidance)).images[0])


def test_formats(client, drawn):
    for form, most in (("jpeg", 40), ("webp", 40)):
        made = client.images.generate(prompt=PROMPT, output_format=form, output_compression=95, extra_body=FAST)
        opened = Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json)))
        assert opened.format == form.upper() and made.output_format == form
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(drawn)).mean() < most


def test_addresses_of_pictures(client, drawn, idle):
    made = client.images.generate(prompt=PROMPT, response_format="url", extra_body=FAST)
    [image] = made.data
    assert image.b64_json is None and image.url.startswith(f"{idle.url}/v1/images/kept/")
    with urllib.request.urlopen(image.url) as answer:
        assert answer.headers["content-type"] == "image/png"
        near(np.asarray(Image.open(io.BytesIO(answer.read()))), drawn)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(image.url.replace("kept/", "kept/x"))


def test_edit_with_and_without_a_mask(client, drawn, pipe):
    clear = Image.new("RGBA", drawn.size, (9, 9, 9, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 32, 64))
    made = client.images.edit(image=png(drawn), mask=png(clear), prompt="a ring", extra_body={**FAST, "strength": 0.9})
    bright = Image.new("L", drawn.size)
    bright.paste(255, (0, 0, 32, 64))
    wanted = Request("a ring", image=drawn, mask=bright, strength=0.9, **FAST)
    near(picture(made.data[0].b64_json), pipe.generate(wanted).images[0])
    assert made.usage.input_tokens_details.image_tokens == 64
    made = client.images.edit(image=[("a.webp", png(drawn))], prompt="a ring", n=2, size="64x64", extra_body=FAST)
    near(picture(made.data[1].b64_json), pipe.generate(Request("a ring", image=drawn, seed=8, steps=3)).images[0])
    two = [png(drawn), png(drawn)]
    error = refused(openai.BadRequestError, lambda: client.images.edit(image=two, prompt="a ring"))
    assert error.param == "image" and "one picture" in error.message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_variation(client, drawn, pipe):
    made = client.images.create_variation(image=png(drawn), n=2, size="64x64", extra_body={**FAST, "strength": 0.5})
    wanted = Request("", image=drawn, strength=0.5, **FAST)
    near(picture(made.data[0].b64_json), pipe.generate(wanted).images[0])


def test_stream(client, drawn):
    for partial in (0, 3):
        stream = client.images.generate(
            prompt=PROMPT, stream=True, partial_images=partial, extra_body={**FAST, "steps": 8}
        )
        events = list(stream)
        assert [each.type for each in events] == ["image_generation.partial_image"] * partial + [
            "image_generation.completed"
        ]
        assert [each.partial_image_index for each in events[:-1]] == list(range(partial))
        assert picture(events[-1].b64_json).shape == (64, 64, 3)
        assert events[-1].usage.total_tokens == 77 + 64 and events[-1].size == "64x64"
    edited = list(client.images.edit(image=png(drawn), prompt="a ring", stream=True, partial_images=1, extra_body=FAST))
    assert [each.type for each in edited] == ["image_edit.partial_image", "image_edit.completed"]


def test_the_asynchronous_client(idle):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{idle.url}/v1", api_key="none") as client:
            stream = await client.images.generate(prompt=PROMPT, stream=True, partial_images=1, extra_body=FAST)
            return [event.type async for event in stream]

    assert asyncio.run(ask())[-1] == "image_generation.completed"


@pytest.mark.parametrize(
    ("param", "words", "options"),
    [
        ("background", "opaque", {"background": "transparent"}),
        ("quality", "steps", {"quality": "high"}),
        ("style", "prompt", {"style": "vivid"}),
        ("size", "WIDTHxHEIGHT", {"size": "big"}),
        ("width", "multiple of 8", {"size": "63x64"}),
        ("size", "most", {"size": "4096x4096"}),
        ("n", "from 1 to 10", {"n": 11}),
        ("partial_images", "from 0 to 3", {"partial_images": 4, "stream": True}),
        ("output_compression", "leave it out for png", {"output_compression": 50}),
        ("output_format", "png, jpeg, webp", {"output_format": "gif"}),
        ("color", "unknown option", {"extra_body": {"color": 1}}),
        ("num_images_per_prompt", "count", {"extra_body": {"num_images_per_prompt": 2}}),
        ("steps", "from 1 to 1000", {"extra_body": {"steps": 100_000}}),
        ("image", "no path", {"extra_body": {"image": "/etc/passwd"}}),
        ("image", "no path", {"extra_body": {"image": "https://example.com/a.png"}}),
        ("loras", "no LoRA", {"extra_body": {"loras": ["/etc/passwd=1"]}}),
        ("output", "pictures", {"extra_body": {"output": "latent"}}),
        ("skip_layers", "skip_guidance_layers", {"extra_body": {"skip_layers": [1]}}),
        ("strength", "has no effect without an image", {"extra_body": {"strength": 0.5}}),
        ("count", "must be a whole number", {"extra_body": {"count": "two"}}),
        ("deadline", "above 0", {"extra_body": {"deadline": -1}}),
        ("seed", "whole number", {"extra_body": {"seed": "seven"}}),
    ],
)
def test_what_is_refused_names_the_field(client, param, words, options):
    error = refused(openai.BadRequestError, lambda: client.images.generate(prompt="a ring", **options))
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert words in error.message and "bundle" not in error.message.replace("pico.bundle", "")


def test_errors_are_those_of_the_api(client):
    error = refused(openai.NotFoundError, lambda: client.images.generate(model="dall-e", prompt="a"))
    assert (error.code, error.param) == ("model_not_found", "model") and "pico" in error.message
    error = refused(openai.BadRequestError, lambda: client.images.edit(image=b"no picture", prompt="a"))
    assert error.param == "image" and "no whole picture" in error.message
    error = refused(
        openai.InternalServerError, lambda: client.images.generate(prompt="a", extra_body={"deadline": 1e-6})
    )
    assert (error.status_code, error.code) == (504, "deadline_exceeded")


def test_a_full_queue_is_429(bundle_of):
    with serving({"pico": bundle_of("pico")}, rows=1, queue=1, warm=True) as small, small.client() as client:
        jobs = [client.post("/jobs", body={"prompt": "a", "steps": 200}, cast_to=dict) for _ in range(2)]
        error = refused(openai.RateLimitError, lambda: client.images.generate(prompt="a"))
        assert error.code == "queue_full" and 1 <= int(error.response.headers["retry-after"]) < 20
        for job in jobs:
            client.delete(f"/jobs/{job['id']}", cast_to=dict)


@pytest.mark.slow
def test_a_client_that_was_refused_comes_again(bundle_of):
    with serving({"pico": bundle_of("pico")}, rows=1, queue=1, warm=True) as small:
        with small.client() as client, small.client(retries=9) as patient, ThreadPoolExecutor(2) as pool:
            both = [pool.submit(client.images.generate, prompt="a", extra_body={"steps": 90}) for _ in range(2)]
            until(lambda: len(small.service.scheduler._images) == 2)
            assert patient.images.generate(prompt="a", extra_body={"steps": 1}).data
            assert all(each.result().data for each in both)
        until(small.is_idle)
