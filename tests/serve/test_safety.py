"""Keys, origins, health and what is counted."""

from __future__ import annotations

import json
import logging

import httpx2
import openai
import pytest

from diffoundry.common.errors import RequestError
from diffoundry.serve.fields import read_fields
from diffoundry.serve.guard import check_origins, read_keys
from diffoundry.serve.kept import KEPT_SECONDS, Kept
from diffoundry.serve.models import Model
from diffoundry.tests.serve.conftest import serving, until

FIRST, SECOND = "sk-first-0123456789", "sk-second-0123456789"


@pytest.fixture(scope="module")
def locked(bundle_of, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# two of them\n{FIRST}\n\n{SECOND} 5\n", encoding="utf-8")
    app = {"origins": ["https://page.example"]}
    with serving({"pico": bundle_of("pico")}, keys=read_keys(file), app=app) as running:
        yield running


def test_keys(locked):
    for key in ("wrong", FIRST + "x", FIRST[:-1], ""):
        with pytest.raises((openai.AuthenticationError, openai.OpenAIError)), locked.client(key) as client:
            client.models.list()
    with locked.client(FIRST) as client:
        assert [model.id for model in client.models.list()] == ["pico"]
    with httpx2.Client(base_url=locked.url) as http:
        answer = http.get("/v1/models")
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"authorization": f"Basic {FIRST}"}).status_code == 401
        assert http.get("/metrics").status_code == 401
        assert http.get("/health/live").status_code == http.get("/health/ready").status_code == 200


def test_priority_is_what_the_key_may_ask_for(locked):
    asked = {"prompt": "a", "extra_body": {"steps": 1, "priority": 5}}
    with locked.client(FIRST) as client, pytest.raises(openai.BadRequestError, match="priority may be 0 at most"):
        client.images.generate(**asked)
    with locked.client(SECOND) as client:
        assert client.images.generate(**asked).data


def test_a_key_that_stands_behind_others_need_not_say_so(pipe):
    model, asked = Model("pico", pipe), {"prompt": "a"}
    assert [read_fields(asked, model, most_priority=most).priority for most in (-5, 0, 5)] == [-5, 0, 0]
    with pytest.raises(RequestError, match="-5 at most"):
        read_fields({**asked, "priority": 0}, model, most_priority=-5)


def test_a_job_is_that_of_its_key(locked):
    with httpx2.Client(base_url=locked.url) as http:
        mine, other = ({"authorization": f"Bearer {key}"} for key in (FIRST, SECOND))
        path = http.post("/v1/jobs", json={"prompt": "a", "steps": 1}, headers=mine).headers["location"]
        assert http.get(path, headers=other).status_code == 404
        assert http.delete(path, headers=other).status_code == 404
        until(lambda: http.get(path, headers=mine).json()["status"] == "succeeded")


def test_many_jobs_of_one_key_leave_those_of_another(locked, monkeypatch):
    monkeypatch.setattr("diffoundry.serve.jobs._MOST_ENDED", 3)
    with httpx2.Client(base_url=locked.url) as http:

        def made(key):
            return http.post("/v1/jobs", json={"prompt": "a", "steps": 50}, headers=key).headers["location"]

        few, many = ({"authorization": f"Bearer {key}"} for key in (FIRST, SECOND))
        kept, *others = made(few), *(made(many) for _ in range(4))
        for path, key in ((kept, few), *((each, many) for each in others)):
            assert http.delete(path, headers=key).status_code == 200
        assert http.get(kept, headers=few).status_code == 200
        assert [http.get(each, headers=many).status_code for each in others] == [404, 404, 200, 200]


def test_pages_of_other_sites(locked, served):
    ask = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with httpx2.Client() as http:
        allowed = http.options(f"{locked.url}/v1/jobs", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = http.options(f"{locked.url}/v1/jobs", headers={**ask, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        assert "access-control-allow-origin" not in http.options(f"{served.url}/v1/jobs", headers=ask).headers
        form, key = {"prompt": (None, "a"), "steps": (None, "1")}, {"authorization": f"Bearer {FIRST}"}
        for origin, code in (("https://page.example", 202), ("https://other.example", 403), (locked.url, 202)):
            answer = http.post(f"{locked.url}/v1/jobs", files=form, headers={**key, "origin": origin})
            assert answer.status_code == code, origin
            if code == 403:
                assert answer.json()["error"]["message"].endswith(
                    "may not ask here: whoever runs the server can let them, by --cors https://other.example"
                )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no keys"),
        ("# only this\n", "has no keys"),
        ("short\n", "line 1 of the key file"),
        (f"{FIRST}\n{SECOND} high\n", "line 2 of the key file"),
        (f"{FIRST} 11\n", "from -10 to 10"),
        (f"{FIRST} 1 2\n", "line 1"),
        (f"{FIRST}\0\n", "line 1"),
        (f"{FIRST}\n{SECOND}\n{FIRST} 5\n", "line 3 .* is there before"),
        (f"{FIRST}\n" * 60_000, "more than 1048576 bytes"),
    ],
)
def test_key_files_that_are_wrong(tmp_path, text, words):
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        read_keys(file)


def test_a_key_file_of_an_editor_that_begins_with_a_mark(tmp_path):
    (tmp_path / "keys").write_text(f"{FIRST} 3\n", encoding="utf-8-sig")
    assert [(key.secret, key.priority) for key in read_keys(tmp_path / "keys")] == [(FIRST, 3)]


@pytest.mark.parametrize("origin", ["", "example.org", "https://example.org/", "https://a b", "HTTPS://a", "http://"])
def test_what_is_no_origin(origin):
    with pytest.raises(RequestError, match="such as https:"):
        check_origins(["https://example.org:8443", "http://[::1]:80", "null", "*", origin])


def test_what_should_not_happen_is_not_told(idle, monkeypatch, caplog):
    monkeypatch.setattr("diffoundry.serve.images.described", lambda model: 1 // 0)
    logging.getLogger("diffoundry.serve").propagate = True
    with httpx2.Client(base_url=idle.url) as http:
        answer = http.get("/v1/models")
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "ZeroDivision" not in answer.text
    until(lambda: any("ZeroDivisionError" in each.getMessage() for each in caplog.records))  # after the answer


def test_kept_pictures_are_forgotten():
    now = [0.0]
    kept = Kept(most_bytes=10, clock=lambda: now[0])
    first, second = kept.put(b"12345", "image/png"), kept.put(b"12345", "image/webp")
    assert kept.get(first).data == b"12345" and second.endswith(".webp")
    third = kept.put(b"1", "image/png")
    assert kept.get(first) is None and kept.get(second) is not None
    kept.drop(second)
    kept.drop(second)
    assert kept.get(second) is None and kept._bytes == 1
    now[0] = KEPT_SECONDS
    assert kept.get(third) is None and kept._bytes == 0
    few = Kept(most_files=2)
    names = [few.put(b"1", "image/png") for _ in range(3)]
    assert [few.get(name) is None for name in names] == [True, False, False]


def test_metrics_and_the_log(idle, caplog):
    logging.getLogger("diffoundry.serve").propagate = True
    with idle.client() as client, caplog.at_level(logging.INFO, "diffoundry.serve"):
        client.images.generate(prompt="a", n=2, extra_body={"steps": 2})
    until(lambda: any("generations" in record.getMessage() for record in caplog.records))
    [line] = [json.loads(record.getMessage()) for record in caplog.records if "generations" in record.getMessage()]
    assert (line["status"], line["images"], line["steps"], line["model"]) == (200, 2, 2, "pico")
    assert {"time", "id", "client", "method", "route", "seconds"} <= set(line)
    with httpx2.Client(base_url=idle.url) as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(values['diffoundry_images_total{model="pico"}']) >= 2
    assert float(values['diffoundry_requests_total{route="/v1/images/generations",status="200"}']) >= 1
    assert float(values["diffoundry_step_seconds_count"]) >= 2
    assert float(values["process_resident_memory_bytes"]) > 0
    assert {"diffoundry_waiting_images", "diffoundry_moving_images", "diffoundry_wait_seconds_sum"} <= set(values)
