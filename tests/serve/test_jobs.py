"""Jobs: made, watched, asked for again, cancelled."""

from __future__ import annotations

import io
import json
import urllib.request

import httpx2
import numpy as np
import pytest
from PIL import Image

from diffoundry import Request
from diffoundry.tests.serve.conftest import picture, png, until

PROMPT = "a large red star at the left on a navy background"


@pytest.fixture
def http(idle):
    with httpx2.Client(base_url=idle.url, timeout=30) as client:
        yield client


def events(answer):
    """The names and values of server-sent events as they come."""
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def ended(http, id):
    found = {}
    until(lambda: found.update(http.get(f"/v1/jobs/{id}").json()) or found["status"] not in ("queued", "running"))
    return found


def test_a_job_from_its_begin_to_its_pictures(http, pipe):
    made = http.post("/v1/jobs", json={"prompt": PROMPT, "seed": 7, "steps": 4, "n": 2, "partial_images": 1})
    assert made.status_code == 202
    job = made.json()
    assert made.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["object"], job["model"], job["steps"]) == ("job", "pico", 8)
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = list(events(answer))
    names = [name for name, _ in seen]
    assert names[0] == "state" and names[-1] == "succeeded"
    done = ended(http, job["id"])
    assert seen[-1][1] == done and done["request"]["seed"] == 7 and done["seconds_left"] == 0
    for i, image in enumerate(done["images"]):
        with urllib.request.urlopen(image["url"]) as file:
            found = np.asarray(Image.open(io.BytesIO(file.read()))).astype(int)
        wanted = pipe.generate(Request(PROMPT, seed=7 + i, steps=4)).images[0]
        assert np.abs(found - np.asarray(wanted)).max() <= 1 and image["seed"] == 7 + i


def test_steps_and_previews_are_sent_while_it_is_drawn(http):
    job = http.post("/v1/jobs", json={"prompt": PROMPT, "steps": 40, "partial_images": 2}).json()
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        seen = list(events(answer))
    steps = [value for name, value in seen if name == "step"]
    assert [each["step"] for each in steps] == sorted(each["step"] for each in steps)
    assert steps[-1]["step"] == 40 and steps[0]["seconds_left"] > 0
    assert [value["number"] for name, value in seen if name == "preview"] == [0, 1]
    shown = next(value for name, value in seen if name == "preview")
    assert picture(shown["b64_json"]).shape == (64, 64, 3)


def test_a_form_and_a_picture_make_a_job(http, pipe):
    image = pipe.generate(Request("a ring", seed=1, steps=2)).images[0]
    form = {"prompt": PROMPT, "seed": "7", "steps": "4", "strength": "0.9", "response_format": "b64_json"}
    made = http.post("/v1/jobs", data=form, files={"image": ("a.png", png(image))})
    done = ended(http, made.json()["id"])
    wanted = pipe.generate(Request(PROMPT, image=image, seed=7, steps=4, strength=0.9)).images[0]
    assert np.abs(picture(done["images"][0]["b64_json"]).astype(int) - np.asarray(wanted)).max() <= 1


def test_delete_frees_the_rows(http, idle):
    job = http.post("/v1/jobs", json={"prompt": PROMPT, "steps": 500, "n": 3}).json()
    until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["step"] > 0)
    answer = http.delete(f"/v1/jobs/{job['id']}")
    assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
    assert answer.json()["step"] < 1500
    until(idle.is_idle)


def test_the_place_in_the_queue(http):
    jobs = [http.post("/v1/jobs", json={"prompt": "a", "steps": 500}).json() for _ in range(4)]
    until(lambda: all(http.get(f"/v1/jobs/{job['id']}").json()["status"] == "running" for job in jobs))
    last = http.post("/v1/jobs", json={"prompt": "a", "steps": 500}).json()
    assert (last["status"], last["place"]) == ("queued", 1) and last["seconds_left"] > 0
    for job in (last, *jobs):
        assert http.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"


def test_a_deadline_that_cannot_be_kept(http):
    answer = http.post("/v1/jobs", json={"prompt": "a", "steps": 500, "deadline": 0.001})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"


def test_jobs_that_are_not_there(http):
    for call in (http.get, http.delete):
        answer = call("/v1/jobs/nothing")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert http.get("/v1/jobs/nothing/events").status_code == 404
    answer = http.post("/v1/jobs", json={"prompt": "a", "stream": True})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream"
