"""Requests that are wrong in every way: each gets its code, none a traceback, and the server draws on."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import struct
import zlib

import httpx2
import numpy as np
import pytest
from PIL import Image

from diffoundry.common.errors import DiffoundryError, RequestError
from diffoundry.serve import parts
from diffoundry.serve.errors import FieldError, refusal
from diffoundry.serve.fields import KNOWN, read_fields
from diffoundry.serve.models import Model
from diffoundry.serve.pictures import Upload
from diffoundry.tests.serve.conftest import png, until

ROUTES = ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/jobs")
SMALL = png(Image.new("RGB", (16, 16)))
NAMES = (
    *("prompt", "negative_prompt", "seed", "steps", "guidance", "scheduler", "strength", "control", "loras", "image"),
    *(
        "mask",
        "image_prompt",
        "n",
        "size",
        "model",
        "stream",
        "partial_images",
        "output_format",
        "priority",
        "deadline",
    ),
    *("timesteps", "sigmas", "scheduler_options", "conditioning", "prompt_embeds", "guidance_interval", "width", "rng"),
    *(
        "windows",
        "weights",
        "clip_skip",
        "padding_mask_crop",
        "tiled",
        "decoder",
        "resize",
        "forecast",
        "count",
        "user",
    ),
)
VALUES = (
    *(None, True, False, 0, -1, 1, 3.5, 1e308, 10**400, "", "a", "\ud800", "\0", "../../etc/passwd", "http://a/b"),
    *([], [[]], [1, 2], ["a"], {}, {"name": "x"}, {"name": [], "image": {}}, [{}], [[[[1]]]], "x" * 40_000),
    *(base64.b64encode(SMALL).decode(), base64.b64encode(SMALL[:40]).decode(), "64x64", "99999x99999", "euler", 2**63),
)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


PICTURES = (
    *(b"", b"GIF89a", SMALL[:60], SMALL + b"more", bomb(60_000, 60_000), bomb(5000, 5000), bomb(0, 0), bomb(64, 64)),
    *(b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", png(Image.new("RGB", (8, 8)), "BMP")),
)


def wrong(rng: random.Random) -> dict:
    """A request that is unlikely to be right, as arguments of `httpx2.Client.request`."""
    kind = rng.randrange(6)
    fields = {name: rng.choice(VALUES) for name in rng.sample(NAMES, rng.randrange(1, 6))}
    fields |= {"steps": rng.choice([1, 2, "x", -3, [2]])} if rng.random() < 0.3 else {"steps": 1}
    fields |= {"prompt": "a"} if rng.random() < 0.9 else {"color": 1}
    fields |= {"image": base64.b64encode(SMALL).decode()} if rng.random() < 0.3 else {}
    text = json.dumps(fields).encode()
    if kind == 0:
        return {"content": text, "headers": {"content-type": "application/json"}}
    if kind == 1:  # damaged JSON
        at = rng.randrange(len(text))
        cut = text[:at] + bytes([rng.randrange(256)]) * rng.randrange(3) + text[at + rng.randrange(3) :]
        return {"content": cut, "headers": {"content-type": "application/json"}}
    if kind == 2:  # a form with pictures
        files = {rng.choice(("image", "image[]", "mask", "control[][image]")): ("a.png", rng.choice(PICTURES))}
        form = {name: str(value) for name, value in fields.items() if "\ud800" not in str(value)}
        return {"data": form, "files": files}
    if kind == 3:  # a damaged form
        body = bytes(rng.randrange(256) for _ in range(rng.randrange(300)))
        start = rng.choice((b"", b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n'))
        boundary = rng.choice(("; boundary=x", "", "; boundary=", "; boundary=" + "y" * 500))
        return {"content": start + body, "headers": {"content-type": f"multipart/form-data{boundary}"}}
    if kind == 4:  # another type, or other letters
        kinds = ("text/plain", "", "application/x-www-form-urlencoded", "application/json; charset=utf-16")
        return {"content": text, "headers": {"content-type": rng.choice(kinds)}}
    deep = rng.choice(
        (b"[" * 100_000, b'{"a":' * 100_000, b"1" * 6000, b"NaN", b'{"seed": NaN}', b'{"n":1,"n":2}', b"\xff")
    )
    return {"content": deep, "headers": {"content-type": "application/json"}}


def any_value(rng: random.Random, depth: int = 0):
    """A value of a field, lists and objects among them."""
    kind = rng.randrange(5) if depth < 3 else 0
    if kind < 3:
        return rng.choice(VALUES)
    if kind == 3:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = (
        "name",
        "image",
        "scale",
        "interval",
        "mode",
        "embeds",
        "strength",
        "original_size",
        "crop",
        "eta",
        "order",
    )
    return {"name": "edge", "image": base64.b64encode(SMALL).decode(), rng.choice(names): any_value(rng, depth + 1)}


def test_fields_of_any_kind_are_taken_or_refused(pipe):
    """Nothing else is raised, so none of them ends in an answer of 500."""
    rng, model, refused = random.Random(3), Model("pico", pipe), 0
    for _ in range(5000):
        given = {"prompt": "a", "steps": 2, **{rng.choice(KNOWN): any_value(rng) for _ in range(rng.randrange(1, 4))}}
        try:
            pipe.job(read_fields(given, model, most_priority=0).request)
        except DiffoundryError:
            refused += 1
    assert 3000 < refused < 5000


def test_remedies_are_those_of_a_client(pipe):
    """Who asks over HTTP has no command line here, and no Python."""
    model, image = Model("pico", pipe), base64.b64encode(SMALL).decode()
    for given, words in (
        ({"prompt": ["a", "b"]}, "found a list of 2: send a request for each"),
        ({"scheduler": "none"}, "GET /v1/models lists them"),
        ({"scheduler": "flow-heun", "timesteps": [3, 2, 1]}, "ask for a number of steps, or"),
        ({"control": {"name": "edge", "image": image}}, "whoever runs the server can compile the checkpoint again"),
        ({"image_prompt": {"image": image}}, "whoever runs the server can compile the checkpoint again"),
        ({"callback_on_step_end": "a"}, "make a job, and read its events"),
        ({"output_type": "pil"}, "this server gives pictures"),
    ):
        with pytest.raises(DiffoundryError) as found:
            pipe.job(read_fields({"prompt": "a", **given}, model, most_priority=0).request)
        said = refusal(found.value).message
        assert words in said and "`diffoundry schedulers" not in said and "--scheduler" not in said
    for text, said in (
        ("a has b: draw all with them, by set_loras(…, as_inputs=False) or `run --lora`", "a has b: leave some out"),
        (
            "a: no rank is left for b: draw all with it, by `run --lora` without it",
            "a: no rank is left for b: leave some out",
        ),
        (
            "a: ask for one of both, or draw all with these LoRAs, by set_loras(…, as_inputs=False)",
            "a: ask for one of both",
        ),
        ("no steps: ask for fewer --steps, or b", "no steps: ask for fewer steps, or b"),
        ("say which one, a, b, as in --control c:b=PICTURE or mode='b'", "say which one, a, b, as in mode='b'"),
        ("give it a mask, as in --control-mask c=PICTURE or mask=PICTURE", "give it a mask, as in mask=PICTURE"),
        (
            "a takes 4: run `diffoundry build a --lora-rank 8`",
            "a takes 4: whoever runs the server can run `diffoundry build a --lora-rank 8`",
        ),
    ):
        assert refusal(RequestError(text)).message == said


def ask_wrongly(served, seed: int, count: int) -> dict[int, int]:
    """How often each code was answered."""
    rng, codes = random.Random(seed), {}
    with httpx2.Client(base_url=served.url, timeout=30) as http:
        for _ in range(count):
            answer = http.request("POST", rng.choice(ROUTES), **wrong(rng))
            codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
            if answer.status_code not in (200, 202):
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"]
                assert "Traceback" not in answer.text and "/tmp/" not in answer.text and "\n" not in error["message"]
    return codes


def test_a_mask_of_a_control_is_no_path(tmp_path):
    image = Image.new("L", (8, 8), 255)
    image.save(tmp_path / "mask.png")
    data = base64.b64encode(png(image)).decode()
    given = {"name": "edge", "image": data}
    [control] = parts.controls("control", {**given, "mask": data})
    assert isinstance(control.mask, Image.Image) and control.mask.getextrema() == (255, 255)
    with pytest.raises(FieldError, match="no path"):
        parts.controls("control", {**given, "mask": str(tmp_path / "mask.png")})


def test_pictures_that_are_too_many_are_not_read(pipe):
    with pytest.raises(FieldError, match="starts from one picture, found 2"):
        parts.pictures({"image": [Upload(b"none"), Upload(b"none")]}, Model("pico", pipe))


def test_a_hundred(idle):
    codes = ask_wrongly(idle, 1, 100)
    assert set(codes) <= {200, 202, 400, 404, 415}, codes
    assert codes[400] > 40


@pytest.mark.slow
def test_two_thousand(idle):
    codes = ask_wrongly(idle, 2, 2000)
    assert set(codes) <= {200, 202, 400, 404, 415, 429}, codes
    assert codes[400] > 800


def test_a_picture_of_too_many_pixels_is_not_decoded(idle):
    with httpx2.Client(base_url=idle.url) as http:
        for data, words in (
            (bomb(60_000, 60_000), "far more than 16777216 pixels"),
            (bomb(5000, 5000), "16777216 are the most"),
        ):
            answer = http.post("/v1/images/edits", data={"prompt": "a"}, files={"image": ("a.png", data)})
            assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_a_body_that_is_too_large(idle):
    """By what it says, and by what comes."""
    with connected(idle) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n")
        assert b" 413 " in connection.recv(1000)
    with httpx2.Client(base_url=idle.url) as http:

        def parts():
            for _ in range(80):
                yield b" " * (1 << 20)

        answer = http.post("/v1/jobs", headers={"content-type": "application/json"}, content=parts())
        assert answer.status_code == 413 and "64 MiB" in answer.json()["error"]["message"]


def test_other_paths_and_methods(idle):
    with httpx2.Client(base_url=idle.url) as http:
        for method, path, code in (
            ("GET", "/page", 404),
            ("POST", "/", 405),
            ("GET", "/v1/images/generations", 405),
            ("PUT", "/v1/jobs/x", 405),
            ("GET", "/v1/images/kept/../../../etc/passwd", 404),
            ("GET", "/v1/images/kept/%2e%2e%2fbundle.json", 404),
        ):
            answer = http.request(method, path)
            assert answer.status_code == code and answer.json()["error"]["message"], path


def test_a_method_that_is_not_taken_is_told_those_that_are(idle):
    with httpx2.Client(base_url=idle.url) as http:
        answer = http.put("/v1/jobs/x")
    assert answer.headers["allow"] == "DELETE, GET, HEAD" and answer.json()["error"]["code"] == "method_not_allowed"
    assert answer.json()["error"]["message"] == "/v1/jobs/x takes DELETE, GET, HEAD, not PUT"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", "seed must be a whole number"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "a number in it has too many digits"),
        (b'{"prompt": "a", "size": "8x4104"}', "a side of 4104 pixels is too long, 4096 are the most"),
        (b'{"prompt": "a", "user": "\\ud800"}', "must be texts of at most 512 letters"),
        (b'{"prompt": "a", "\\ud800": 1}', "unknown option '\\ud800'"),
        (b'{"prompt": "a", "background": "transparent"}', "no effect here (pictures here are opaque): leave it out"),
    ],
)
def test_it_is_said_in_few_words(idle, body, words):
    answer = httpx2.post(f"{idle.url}/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"] and len(answer.text) < 2500


def connected(served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))


def test_what_is_no_http(idle):
    with connected(idle) as connection:
        connection.sendall(b"\x16\x03\x01 no request at all\r\n\r\n")
        assert b"400" in connection.recv(1000)


def test_a_client_that_goes_away_frees_its_rows(idle):
    long = {"prompt": "a", "steps": 500, "n": 2}
    for more in ({}, {"stream": True, "partial_images": 2}):
        body = json.dumps({**long, **more}).encode()
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with connected(idle) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: len(idle.service.scheduler._rows))
        until(idle.is_idle)


def test_one_that_stops_amid_its_body(idle):
    with connected(idle) as connection:
        head = b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        connection.sendall(head)
    with idle.client() as client:
        made = client.images.generate(prompt="a", extra_body={"steps": 1})
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json)))).shape == (64, 64, 3)
