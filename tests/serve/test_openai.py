"""Every call of OpenAI's images API by its official client, against a server that listens."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import math
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image

import diffoundry
from diffoundry import Guidance, ImagePrompt, Request
from diffoundry.serve.fields import KNOWN
from diffoundry.serve.kept import KEPT_SECONDS
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


def test_every_parameter_of_the_client_is_known():
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    for call in ("generate", "edit", "create_variation"):
        own = set(inspect.signature(inspect.unwrap(getattr(openai.resources.Images, call))).parameters) - transport
        assert own <= set(KNOWN), call


def is_valid(answer):
    """Whether an answer is what the client says that it is; it takes more than it asks for."""
    return type(answer).model_validate(answer.to_dict()) is not None


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object) == ("pico", "model")
    assert is_valid(model) and model.model_extra["diffoundry"]["tasks"] == ["txt2img", "img2img", "inpaint"]
    assert client.models.retrieve("pico") == model
    assert refused(openai.NotFoundError, lambda: client.models.retrieve("other")).code == "model_not_found"


def test_generate(client, drawn, pipe):
    made = client.images.generate(model="pico", prompt=PROMPT, n=2, size="64x64", extra_body=FAST)
    near(picture(made.data[0].b64_json), drawn)
    near(picture(made.data[1].b64_json), pipe.generate(Request(PROMPT, seed=8, steps=3)).images[0])
    assert is_valid(made) and (made.size, made.background, made.output_format) == ("64x64", "opaque", "png")
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
    for partial in range(4):
        stream = client.images.generate(
            prompt=PROMPT, stream=True, partial_images=partial, extra_body={**FAST, "steps": 8}
        )
        events = list(stream)
        assert [each.type for each in events] == ["image_generation.partial_image"] * partial + [
            "image_generation.completed"
        ]
        assert [each.partial_image_index for each in events[:-1]] == list(range(partial))
        assert all(map(is_valid, events))
        assert picture(events[-1].b64_json).shape == (64, 64, 3)
        assert events[-1].usage.total_tokens == 77 + 64 and events[-1].size == "64x64"
    mask = Image.new("RGBA", drawn.size)
    asked = {"prompt": "a ring", "mask": png(mask), "stream": True, "partial_images": 1, "extra_body": FAST}
    edited = list(client.images.edit(image=png(drawn), **asked))
    assert [each.type for each in edited] == ["image_edit.partial_image", "image_edit.completed"]
    assert all(map(is_valid, edited))


@pytest.fixture
def tickets(idle, monkeypatch):
    """Those that the shared server takes."""
    found, submit = [], idle.service.scheduler.submit
    monkeypatch.setattr(idle.service.scheduler, "submit", lambda ticket: (found.append(ticket), submit(ticket)))
    return found


def test_partial_images_that_nobody_sees_are_not_made(client, tickets):
    client.images.generate(prompt=PROMPT, partial_images=3, extra_body=FAST)
    assert tickets[0].partial_images == 0


def test_one_without_pictures_does_not_wait_for_pictures_of_others(client, idle, monkeypatch):
    monkeypatch.setattr(idle.service, "reading", asyncio.Semaphore(0))
    assert client.images.generate(prompt=PROMPT, timeout=5, extra_body=FAST).data


def test_a_stream_that_fails_on_its_way(client, idle, tickets):
    events = iter(client.images.generate(prompt="a", stream=True, partial_images=3, extra_body={"steps": 80}))
    assert next(events).type == "image_generation.partial_image"
    idle.service.scheduler.cancel(tickets[0])
    error = refused(openai.APIError, lambda: list(events))
    assert "cancelled" in error.message


def test_a_client_that_does_not_wait_frees_its_rows(client, tickets):
    asked = {"prompt": "a", "extra_body": {"steps": 900}}
    refused(openai.APITimeoutError, lambda: client.images.generate(timeout=0.1, **asked))
    asked["extra_body"] = {"steps": 80}
    events = client.images.generate(stream=True, partial_images=3, **asked)
    next(iter(events))
    events.close()
    until(lambda: [ticket.state for ticket in tickets] == ["cancelled", "cancelled"], 5)


def test_answers_as_they_came(client, drawn):
    raw = client.images.with_raw_response.generate(prompt=PROMPT, extra_body=FAST)
    made = raw.parse()
    near(picture(made.data[0].b64_json), drawn)
    assert raw.status_code == 200 and raw.headers["x-request-id"] == raw.request_id == made._request_id
    with client.images.with_streaming_response.generate(prompt=PROMPT, extra_body=FAST) as answer:
        near(picture(json.loads(answer.read())["data"][0]["b64_json"]), drawn)
    error = refused(openai.BadRequestError, lambda: client.images.generate(prompt="a", size="big"))
    assert error.request_id == error.response.headers["x-request-id"]


def test_what_asks_for_nothing_is_taken(client, drawn, tmp_path):
    same = {"background": "auto", "moderation": "low", "quality": "standard", "size": "auto", "stream": False}
    asked = {**same, "n": 1, "user": "one", "safety_identifier": "", "output_compression": 100}
    options = {"extra_headers": {"Idempotency-Key": "k"}, "extra_query": {"a": "b"}, "timeout": 60}
    made = client.images.generate(prompt=PROMPT, **asked, **options, extra_body=FAST)
    near(picture(made.data[0].b64_json), drawn)
    assert made.safety_identifier == "one"
    path = tmp_path / "start.png"
    path.write_bytes(png(drawn))
    for image in (path, io.BytesIO(png(drawn)), ("any.jpeg", png(drawn), "image/jpeg")):
        edited = client.images.edit(image=image, prompt="a ring", model="pico", background="opaque", extra_body=FAST)
        assert edited.usage.input_tokens_details.image_tokens == 64


def test_an_address_is_good_for_an_hour(client, idle, monkeypatch):
    made = client.images.generate(prompt="a", response_format="url", extra_body={"steps": 1})
    later = time.monotonic() + KEPT_SECONDS + 1
    monkeypatch.setattr(idle.service.kept, "_clock", lambda: later)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(made.data[0].url)


def test_sixteen_pictures_and_a_mask(bundle_of):
    bundle = bundle_of("pico+control+union+image-plus")
    colors = [Image.new("RGB", (64, 64), (16 * i, 255 - 16 * i, 90)) for i in range(17)]
    clear = Image.new("RGBA", (64, 64), (9, 9, 9, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 32, 64))
    with serving({"steered": bundle}, rows=2) as served, served.client() as client:
        files = [(f"{i}.png", png(each)) for i, each in enumerate(colors)]
        asked = {"prompt": "a star", "extra_body": FAST}
        made = client.images.edit(image=files[:16], mask=png(clear), **asked)
        error = refused(openai.BadRequestError, lambda: client.images.edit(image=files, **asked))
    assert error.param == "image" and "from 1 to 16" in error.message
    pipe = diffoundry.load(bundle)
    (adapter,) = pipe.bundle.manifest.wiring.image_prompts
    beside = [ImagePrompt(adapter, colors[1:16])]
    mask = clear.getchannel("A").point(lambda alpha: 255 - alpha)
    wanted = pipe.generate(Request("a star", image=colors[0], mask=mask, image_prompt=beside, **FAST)).images[0]
    near(picture(made.data[0].b64_json), wanted)


def test_the_asynchronous_client(idle, drawn):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{idle.url}/v1", api_key="none") as client:
            stream = await client.images.generate(prompt=PROMPT, stream=True, partial_images=1, extra_body=FAST)
            events = [event.type async for event in stream]
            both = await asyncio.gather(
                client.images.edit(image=png(drawn), prompt="a ring", extra_body=FAST),
                client.images.with_raw_response.generate(prompt=PROMPT, extra_body=FAST),
            )
            models = [model.id async for model in client.models.list()]
            return events, both, models, await client.models.retrieve("pico")

    events, (edited, raw), models, model = asyncio.run(ask())
    assert events == ["image_generation.partial_image", "image_generation.completed"]
    assert edited.data[0].b64_json and models == [model.id] == ["pico"]
    near(picture(raw.parse().data[0].b64_json), drawn)


@pytest.mark.parametrize(
    ("param", "words", "options"),
    [
        ("background", "opaque", {"background": "transparent"}),
        ("quality", "steps", {"quality": "high"}),
        ("style", "prompt", {"style": "vivid"}),
        ("complexity", "steps", {"complexity": "high"}),
        ("svg", "PNG", {"svg": {"reasoning": {"effort": "low"}}}),
        ("frame_count", "do not move", {"frame_count": 4}),
        ("frame_duration_ms", "do not move", {"frame_duration_ms": 100}),
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


def test_errors_are_those_of_the_api(client, drawn):
    error = refused(openai.NotFoundError, lambda: client.images.generate(model="dall-e", prompt="a"))
    assert (error.code, error.param) == ("model_not_found", "model") and "pico" in error.message
    error = refused(openai.BadRequestError, lambda: client.images.edit(image=b"no picture", prompt="a"))
    assert error.param == "image" and "no whole picture" in error.message
    small = png(Image.new("RGBA", (32, 32)))
    error = refused(openai.BadRequestError, lambda: client.images.edit(image=png(drawn), mask=small, prompt="a"))
    assert error.param == "mask" and "32x32" in error.message
    error = refused(openai.BadRequestError, lambda: client.images.edit(image=png(drawn), markup=small, prompt="a"))
    assert error.param == "markup" and "mask" in error.message
    error = refused(openai.NotFoundError, lambda: client.chat.completions.create(model="pico", messages=[]))
    assert error.status_code == 404
    nowhere = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)
    refused(openai.APIConnectionError, lambda: nowhere.images.generate(prompt="a"))
    error = refused(
        openai.InternalServerError, lambda: client.images.generate(prompt="a", extra_body={"deadline": 1e-6})
    )
    assert (error.status_code, error.code) == (504, "deadline_exceeded")


@pytest.mark.parametrize(("queue", "patience"), [(1, math.inf), (9, 1.0)])
def test_a_full_queue_is_429(bundle_of, queue, patience):
    options = {"rows": 1, "queue": queue, "patience": patience, "warm": True}
    with serving({"pico": bundle_of("pico")}, **options) as small, small.client() as client:
        jobs = [client.post("/jobs", body={"prompt": "a", "steps": 200}, cast_to=dict) for _ in range(2)]
        error = refused(openai.RateLimitError, lambda: client.images.generate(prompt="a"))
        seconds = int(error.response.headers["retry-after"])
        assert error.code == "queue_full" and 1 <= seconds < 20
        assert 1000 * (seconds - 1) <= int(error.response.headers["retry-after-ms"]) <= 1000 * seconds
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
