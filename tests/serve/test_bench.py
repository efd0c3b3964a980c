"""`diffoundry bench --serve`: a server that runs is measured from outside, and what cannot be measured is one line."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffoundry.bench import client
from diffoundry.bench.client import Outcome, _read_stream
from diffoundry.bench.mix import arrivals, read_mix
from diffoundry.bench.report import load
from diffoundry.bench.served import Options, figures_of, highest, measure
from diffoundry.common.errors import BenchError
from diffoundry.serve.guard import Key
from diffoundry.tests.serve.conftest import png, serving, until

KEYS = ("a" * 16, "b" * 16)
MIX = ("--mix", "60% steps=2 size=64x64,96x64", "--mix", "40% steps=4 scheduler=ddim prompt='a ring, white'")


@pytest.fixture
def tickets(idle, monkeypatch):
    """Those that the shared server takes."""
    found, submit = [], idle.service.scheduler.submit

    def note(ticket):
        found.append(ticket)
        submit(ticket)

    monkeypatch.setattr(idle.service.scheduler, "submit", note)
    return found


@pytest.fixture(scope="module")
def small(bundle_of):
    """A server with keys, which has room for two images."""
    keys = [Key(secret, f"key {i}") for i, secret in enumerate(KEYS)]
    with serving({"pico": bundle_of("pico")}, rows=1, queue=1, keys=keys, warm=True) as running:
        yield running


def test_what_is_asked_for_is_asked_and_measured(called, idle, tickets):
    options = ("--rate", "40,80", "--requests", "12", "--seed", "5", "--partial-images", "2", "--prompt", "a star")
    done = called("bench", "--serve", idle.url, *MIX, *options, "--json", "-")
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert (found["serve_schema_version"], found["complete"], found["url"]) == (1, True, f"{idle.url}/v1")
    assert found["models"] == ["pico"] and found["p99_s"] is found["rate_per_s"] is None
    assert [kind["text"] for kind in found["kinds"]] == [
        "steps=2 size=64x64,96x64",
        "steps=4 scheduler=ddim 'prompt=a ring, white'",
    ]
    warm, counted = tickets[:5], tickets[5:]
    assert [ticket.job.size for ticket in warm[:2]] == [(64, 64), (96, 64)]
    assert len(counted) == 24 and {ticket.partial_images for ticket in counted} == {2}
    assert sorted(ticket.job.seeds[0] for ticket in counted[:12]) == list(range(5, 17))
    for ticket in counted:
        wanted = (2, "a star") if ticket.job.request.steps == 2 else (4, "a ring, white")
        assert (ticket.job.request.steps, ticket.job.request.prompt) == wanted
    for tried, rate in zip(found["tried"], (40, 80), strict=True):
        assert (tried["rate"], tried["complete"], tried["holds"]) == (rate, True, None)
        figures = tried["all"]
        assert (figures["sent"], figures["drawn"], figures["refused"], figures["failed"]) == (12, 12, 0, 0)
        assert sum(kind["sent"] for kind in tried["kinds"]) == 12
        for asked in tried["requests"]:
            assert 0 < asked["late_s"] <= asked["first_s"] <= asked["last_s"] and asked["images"] == 1
        last = [asked["last_s"] for asked in tried["requests"]]
        assert figures["last_s"]["p90"] == pytest.approx(np.percentile(last, 90))
        ends = max(asked["at"] + asked["last_s"] for asked in tried["requests"])
        assert figures["images_per_s"] == pytest.approx(12 / ends)
    at = [[asked["at"] for asked in tried["requests"]] for tried in found["tried"]]
    assert np.allclose(at[0], 2 * np.array(at[1])) and at[0] == sorted(at[0])


def test_a_picture_to_start_from_and_answers_without_a_stream(called, idle, tickets, tmp_path):
    path = tmp_path / "start.png"
    path.write_bytes(png(Image.new("RGB", (64, 64), "red")))
    mix = ("--mix", f"image={path} steps=4 strength=0.5 n=2 guidance=1")
    done = called(
        "bench", "--serve", f"{idle.url}/v1/", *mix, "--rate", "9", "--requests", "2", "--partial-images", "0"
    )
    assert done.returncode == 0, done.stderr
    assert tickets[-1].job.picture is not None and tickets[-1].count == 2 and tickets[-1].partial_images == 0
    assert "All requests" in done.stdout and "last p99" in done.stdout and "first p50" not in done.stdout


def test_a_server_that_has_no_room_is_told_with_its_retry_after(small):
    kinds = read_mix(["steps=40"])
    report = measure(Options(f"{small.url}/v1", kinds, (200.0,), 8, keys=KEYS, p99_s=60.0), lambda report: None)
    (tried,) = report.tried
    figures = tried.all
    assert figures.sent == 8 and figures.refused > 0 and figures.drawn + figures.refused == 8 and figures.failed == 0
    assert figures.retry_after_s[0] >= 1 and figures.drawn >= 2
    assert tried.holds is False and report.rate_per_s == 0 and report.keys == 2
    refused = [each for each in tried.requests if each.is_refused]
    assert all(each.status == 429 and "queue is full" in each.error and each.last_s is None for each in refused)
    until(small.is_idle)


def test_keys_are_used_in_turn_and_wrong_ones_are_told(called, small, tmp_path):
    file = tmp_path / "keys"
    ask = ("bench", "--serve", small.url, "--rate", "1", "--requests", "1", "--mix", "steps=1")
    done = called(*ask)
    assert_fails(done, "refuses requests without a key", "--api-key-file")
    file.write_text(f"# ours\n{KEYS[0]} 5\n{'c' * 16}\n", encoding="ascii")
    assert_fails(called(*ask, "--api-key-file", file), "refuses key 2 of the file")
    assert_fails(called(*ask, "--api-key-file", tmp_path / "none"), "cannot be read", "a key a line")
    file.write_text(f"{KEYS[0]} 5\n{KEYS[1]}\n", encoding="ascii")
    assert called(*ask, "--api-key-file", file).returncode == 0
    assert [each.key for each in arrivals(read_mix([]), 4, 1.0, 0, keys=2)] == [0, 1, 0, 1]


def test_a_limit_that_one_request_alone_does_not_hold(called, idle):
    done = called("bench", "--serve", idle.url, "--mix", "steps=3", "--p99", "0.00001")
    assert done.returncode == 0 and "No rate that was tried holds p99 within 10.0 µs" in done.stdout


def assert_fails(done, *words):
    assert done.returncode == 1 and done.stdout == "", done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ") and "Traceback" not in done.stderr
    for word in words:
        assert word in line


REFUSED = {
    "no address": ("garbage", (), "takes the address of a server, such as http://127.0.0.1:8000, found 'garbage'"),
    "a password": ("http://me:secret@127.0.0.1", (), "give keys by --api-key-file"),
    "a model that is not there": (None, ("--mix", "model=other"), "has no model 'other', only pico"),
    "a size that is refused": (None, ("--mix", "size=63x64"), "does not draw 'size=63x64', status 400: width must be"),
    "a LoRA that is not there": (None, ("--mix", "loras=style=0.8"), "pico has no LoRA 'style'"),
    "an unknown field": (None, ("--mix", "colour=3"), "unknown option 'colour'"),
    "a mix of words": (None, ("--mix", "half steps"), "'half' is no NAME=VALUE"),
    "an open quote": (None, ("--mix", "prompt='a"), "cannot be read (No closing quotation)"),
    "a field twice": (None, ("--mix", "steps=4 steps=5"), "steps is given twice"),
    "a field of the whole run": (None, ("--mix", "stream=true"), "give --partial-images"),
    "no share": (None, ("--mix", "0% steps=4"), "the shares of --mix are all 0"),
    "too many values": (None, ("--mix", "steps=1,2,3,4,5,6,7,8,9 seed=1,2,3,4,5,6,7,8"), "72 combinations"),
    "more values than can be listed": (None, ("--mix", " ".join(f"f{i}=1,2" for i in range(90))), "has 1237940039285"),
    "a share that is too large": (None, ("--mix", "9" * 400 + "% steps=4"), "is no NAME=VALUE"),
    "no picture": (None, ("--mix", "image=nowhere.png"), "the image nowhere.png of --mix cannot be read"),
    "another path": ("/other", (), "there is nothing at /other/images/generations"),
    "no folder": (None, ("--json", "nowhere/r.json"), "the folder nowhere does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_one_line(case, called, idle):
    url, options, expected = REFUSED[case]
    url = idle.url + (url or "") if url is None or url.startswith("/") else url
    assert_fails(called("bench", "--serve", url, "--rate", "1", *options), expected)


def test_no_server(called):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert_fails(
        called("bench", "--serve", f"http://127.0.0.1:{port}"), "nothing answers at", "start `diffoundry serve"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--serve", "http://x", "--rate", "0"), "--rate takes requests a second above 0"),
        (("--serve", "http://x", "--rate", "two"), "takes numbers with commas between them"),
        (("--serve", "http://x", "--p99", "nan"), "nan is not in the range 0<x<=86400"),
        (("--serve", "http://x", "--turns", "2"), "leave out --turns; fields of requests stand in --mix"),
        (("bundle", "--serve", "http://x"), "leave out BUNDLE"),
        (("bundle", "--rate", "2"), "--rate goes with --serve URL"),
        (("bundle", "--mix", "steps=2"), "--mix goes with --serve URL"),
    ],
)
def test_wrong_usage_is_told(options, expected, called):
    done = called("bench", *options)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_the_extra_is_named_where_it_is_missing(called, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    assert_fails(called("bench", "--serve", "http://127.0.0.1:1"), "pip install 'diffoundry[bench]'")


def test_a_mix_is_drawn_in_its_shares_and_arrives_at_random():
    kinds = read_mix(["3 steps=4", "1 steps=20,50 guidance_interval=[0,0.5] model=7"])
    assert kinds[1].fields == {"steps": (20, 50), "guidance_interval": ([0, 0.5],), "model": ("7",)}
    coming = arrivals(kinds, 4000, 10.0, 1)
    gaps = np.diff([each.at for each in coming])
    assert gaps.mean() == pytest.approx(0.1, rel=0.05) and gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert np.mean([each.kind == 0 for each in coming]) == pytest.approx(0.75, abs=0.03)
    assert {each.fields["steps"] for each in coming if each.kind == 1} == {20, 50}
    assert [each.fields for each in arrivals(kinds, 9, 1.0, 1)] == [each.fields for each in coming[:9]]
    assert [each.fields for each in arrivals(kinds, 9, 1.0, 2)] != [each.fields for each in coming[:9]]


@pytest.mark.parametrize("most", [1.3, 3.0, 37.0, 399.0])
def test_the_search_finds_the_highest_rate(most):
    tried = []

    async def holds(rate):
        tried.append(rate)
        return rate <= most

    found = asyncio.run(highest(10.0, holds))
    assert 0.95 * most < found <= most and len(tried) < 14
    tried.clear()
    assert asyncio.run(highest(1e9, holds)) == 0 and len(tried) == 4


def test_events_that_come_in_pieces_and_without_names(monkeypatch):
    text = (
        b": here\r\n\r\ndata: {\"type\": \"image_generation.partial_image\"}\r\n\r\n"
        b"event: image_edit.completed\ndata: {\"b64_json\":\ndata: \"\"}\n\ndata: [DONE]\n\n"
        b"event: error\ndata: {\"error\": {\"message\": \"it broke\"}}\n\n"
    )  # fmt: skip

    async def read(data, size):
        async def pieces():
            for at in range(0, len(data), size):
                yield data[at : at + size]

        outcome = Outcome(0.0)
        await _read_stream(pieces(), outcome)
        return outcome

    for size in (1, 7, 1000):
        found = asyncio.run(read(text, size))
        assert 0 < found.first <= found.last and found.images == 1 and found.error == "it broke"
    for none in (b"data: {}\n\n", b"event: image_generation.completed\ndata: {}\n\n"):
        assert asyncio.run(read(none, 9)).error == "the stream ended without a picture"
    monkeypatch.setattr(client, "_MOST_BYTES", 99)
    with pytest.raises(BenchError, match="answers with more than"):
        asyncio.run(read(b"data: " + b"a" * 100, 9))


def test_reports_of_servers_are_not_compared_as_those_of_bundles(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"serve_schema_version": 1}', encoding="utf-8")
    with pytest.raises(BenchError, match="a report of `diffoundry bench --serve`"):
        load(path)
    assert figures_of([]).last_s is None


@pytest.mark.slow
def test_a_search_and_an_interrupted_run(called, idle, tmp_path):
    path = tmp_path / "r.json"
    done = called("bench", "--serve", idle.url, "--mix", "steps=2", "--p99", "0.5", "--requests", "10", "--json", path)
    assert done.returncode == 0 and "p99 within 500 ms" in done.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    held = [tried["rate"] for tried in found["tried"] if tried["holds"]]
    assert found["rate_per_s"] == max(held, default=0)
    for tried in found["tried"]:
        assert not tried["holds"] or tried["all"]["last_s"]["p99"] <= 0.5
    line = [sys.executable, "-m", "diffoundry", "bench", "--serve", idle.url, "--rate", "5", "--requests", "1000"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    process = subprocess.Popen([*line, "--json", str(path)], stdout=-1, stderr=-1, text=True, preexec_fn=listen)
    for shown in process.stderr:
        if "requests/s" in shown and "0/1000" not in shown:
            break
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted: the report has what was measured until then" in said
    assert "Traceback" not in said and "did not go to its end" in shown
    found = json.loads(path.read_text(encoding="utf-8"))
    assert not found["complete"] and 0 < found["tried"][0]["all"]["sent"] < 1000
