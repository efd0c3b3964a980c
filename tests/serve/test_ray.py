"""`diffoundry serve --ray`: what it refuses, and two replicas of Ray Serve on this machine, one of which is killed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest

from diffoundry import Request
from diffoundry.common.errors import DiffoundryError
from diffoundry.serve.cluster import Replicas, read_arguments
from diffoundry.serve.drawer import Moved, Order, kind_of
from diffoundry.tests.conftest import REPOSITORY
from diffoundry.tests.serve.conftest import picture, until
from diffoundry.tests.serve.test_command import fails
from diffoundry.tests.serve.test_jobs import ended, events

PROMPT = "a large red star at the left on a navy background"
KEY = "a-key-of-the-cluster"
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed, it is not among the tools of `dev`: pip install '.[ray]'",
)


def test_the_extra_is_named_where_ray_is_missing(called, bundle_of, monkeypatch):
    from diffoundry.serve.ray import build

    monkeypatch.setitem(sys.modules, "ray", None)
    pico = bundle_of("pico")
    fails(called("serve", pico, "--ray", "--threads", 1), "pip install 'diffoundry[ray]'")
    with pytest.raises(DiffoundryError, match=r"diffoundry\[ray\]"):
        build({"bundles": str(pico), "threads": "1"})


def test_bad_input_is_refused_before_ray_is_looked_for(called, bundle_of, tmp_path):
    pico = bundle_of("pico")
    fails(called("serve", pico, "--replicas", "2"), "--replicas is for --ray")
    fails(called("serve", pico, "--ray"), "give --threads")
    fails(called("serve", pico, "--ray", "--threads", 1, "--replicas", "4-2"), "MIN-MAX", "'4-2'")
    fails(called("serve", pico, "--ray", "--threads", 1, "--port", 0), "another --port")
    fails(called("serve", pico, "--ray", "--engine", "openvino:gpu"), "openvino:gpu", "leave out --ray")
    fails(called("serve", tmp_path, "--ray", "--threads", 1), "bundle.json")
    fails(called("serve", pico, "--ray", "--threads", 1, "--api-key-file", tmp_path / "none"), "a key a line")


def test_the_files_of_the_documentation():
    """The application of the one is there and takes its arguments; the other has what `ray up` needs."""
    import yaml

    page = (REPOSITORY / "docs" / "serve.md").read_text("utf-8")
    serve, cluster = (yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S))
    (application,) = serve["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    options, replicas = read_arguments(application["args"])
    assert options.keys == Path("/models/keys") and replicas == Replicas(1, 4)
    assert {"cluster_name", "provider", "auth", "head_start_ray_commands"} <= set(cluster)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(bundle_of, tmp_path_factory):
    """Two replicas of one thread each; the client of OpenAI's API that asks them, and the address."""
    ray = pytest.importorskip("ray")
    from ray import serve

    from diffoundry.serve.ray import NAME, build

    keys, port = tmp_path_factory.mktemp("ray") / "keys", free_port()
    keys.write_text(KEY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 << 20)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            arguments = {"bundles": f"pico={bundle_of('pico')}", "threads": "1", "replicas": "2", "max_rows": "4"}
            serve.run(
                build(
                    {**arguments, "warm": "true", "queue": 500, "patience": 1e6, "api_key_file": str(keys), "drain": 5}
                ),
                name=NAME,
                route_prefix="/",
            )
            url = f"http://127.0.0.1:{port}"
            with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
                yield client, url
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def http(cluster):
    with httpx2.Client(base_url=cluster[1], timeout=60, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


def replicas():
    """The processes of the replicas of the Ray that this process started."""
    parents, found = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ServeReplica:diffoundry:drawer" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return [each for each in found if parents.get(parents[each]) == os.getpid()]


def metric(http, name):
    return float(re.search(rf"^{name} (.*)$", http.get("/metrics").text, re.MULTILINE)[1])


def close(data, wanted):
    return np.abs(picture(data).astype(int) - np.asarray(wanted)).max() <= 1


@needs_ray
@pytest.mark.slow
def test_pictures_are_those_of_run(cluster, pipe):
    """Those of one request may be drawn by several replicas; the sizes and schedulers of others are beside them."""
    client, _ = cluster
    asked = [
        {"seed": i, "steps": 5 + i, "scheduler": scheduler, "width": width, "height": 64}
        for i, scheduler in enumerate(("euler_a", "ddim", "dpm++2m", "euler"))
        for width in (64, 96)
    ]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda each: client.images.generate(prompt=PROMPT, n=2, extra_body=each), asked))
    for each, found in zip(asked, made, strict=True):
        wanted = pipe.generate(Request(PROMPT, count=2, **each)).images
        assert all(close(image.b64_json, right) for image, right in zip(found.data, wanted, strict=True)), each
        assert found.usage.input_tokens == 77


@needs_ray
@pytest.mark.slow
def test_streams_go_through(cluster, http, pipe):
    client, _ = cluster
    seen = []
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7, "steps": 200})
    for event in stream:
        seen.append((event.type.rpartition(".")[2], time.monotonic(), event))
    assert [name for name, *_ in seen] == ["partial_image", "partial_image", "completed"]
    assert seen[-1][1] - seen[0][1] > 0.05, "all came at once"
    assert close(seen[-1][2].b64_json, pipe.generate(Request(PROMPT, seed=7, steps=200)).images[0])


@needs_ray
@pytest.mark.slow
def test_jobs_are_found_cancelled_and_their_pictures_fetched(cluster, http, pipe):
    job = http.post("/v1/jobs", json={"prompt": PROMPT, "seed": 7, "steps": 40, "n": 2, "partial_images": 1}).json()
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        seen = list(events(answer))
    names = [name for name, _ in seen]
    assert names[0] == "state" and names[-1] == "succeeded" and names.count("preview") == 2 and "step" in names
    for i, image in enumerate(ended(http, job["id"])["images"]):
        import base64

        data = base64.b64encode(httpx2.get(image["url"]).content).decode()
        assert close(data, pipe.generate(Request(PROMPT, seed=7 + i, steps=40)).images[0])
    job = http.post("/v1/jobs", json={"prompt": PROMPT, "steps": 900, "n": 4}).json()
    until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["step"] > 0)
    assert http.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
    until(lambda: metric(http, "diffoundry_moving_images") == 0)
    start = time.monotonic()  # the rows are free elsewhere too
    http.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 2}).raise_for_status()
    assert time.monotonic() - start < 5


@needs_ray
@pytest.mark.slow
def test_an_image_goes_where_its_size_is_warm_while_there_is_a_free_row(cluster):
    from ray import serve

    size = (128, 64)
    drawers = serve.get_deployment_handle("drawer", "diffoundry").options(
        stream=True, multiplexed_model_id=kind_of("pico", size)
    )

    def send(steps):
        return drawers.draw.remote(Order("pico", Request(PROMPT, seed=1, steps=steps, width=size[0], height=size[1])))

    def drawn_by(stream):
        seen = []
        for news in stream:
            if isinstance(news, Moved):
                return news.drawer
            seen.append(news)
        raise AssertionError(seen)

    first = drawn_by(send(3))
    time.sleep(5)  # Ray asks for what is warm every second or so
    long = [send(900)]
    try:
        assert drawn_by(long[0]) == first
        assert drawn_by(send(3)) == first, "the other one was idle, but cold"
        for _ in range(3):
            long.append(send(900))
            assert drawn_by(long[-1]) == first
        assert drawn_by(send(3)) != first, "all four rows were taken"
    finally:
        for each in long:
            each.cancel()


@needs_ray
@pytest.mark.slow
def test_keys_and_limits_hold(cluster, http):
    _, url = cluster
    assert httpx2.get(f"{url}/v1/models").status_code == 401
    assert httpx2.get(f"{url}/health/ready").json() == {"status": "ready"}
    assert "<title>" in httpx2.get(url).text
    late = {"prompt": PROMPT, "steps": 900, "deadline": 0.3}
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, "colour": "red"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "colour"
    assert http.post("/v1/images/generations", json=late).status_code == 504
    headers = {"content-type": "application/json"}
    assert http.post("/v1/images/generations", content=b" " * (65 << 20), headers=headers).status_code == 413
    until(lambda: metric(http, "diffoundry_moving_images") == 0)


@needs_ray
@pytest.mark.slow
def test_a_replica_that_is_killed_loses_nothing(cluster, http, pipe):
    """Two thirds of the requests wait for the answer, one third streams; one of two replicas is killed meanwhile."""
    client, _ = cluster
    before, drawn_anew = replicas(), metric(http, "diffoundry_redrawn_images_total")
    assert len(before) == 2

    def ask(seed):
        how = {"prompt": PROMPT, "extra_body": {"seed": seed, "steps": 60}}
        if seed % 3:
            return [client.images.generate(**how).data[0].b64_json]
        seen = list(client.images.generate(stream=True, partial_images=1, **how))
        assert [event.type.rpartition(".")[2] for event in seen] == ["partial_image", "completed"]
        return [seen[-1].b64_json]

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, seed) for seed in range(48)]
        until(lambda: sum(each.done() for each in answers) >= 6, 60)
        os.kill(before[0], signal.SIGKILL)
        found = [answer.result(120) for answer in answers]
    for seed, (data,) in enumerate(found):
        assert close(data, pipe.generate(Request(PROMPT, seed=seed, steps=60)).images[0]), seed
    assert metric(http, "diffoundry_redrawn_images_total") > drawn_anew
    until(lambda: len(set(replicas()) - {before[0]}) == 2, 60)  # another one took its place


@needs_ray
@pytest.mark.slow
def test_the_command_draws_what_it_has_before_it_ends(bundle_of, tmp_path):
    port = free_port()
    line = [sys.executable, "-m", "diffoundry", "serve", str(bundle_of("pico")), "--ray", "--threads", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "shown").open("w+") as shown:
        process = subprocess.Popen(
            [*line, "--replicas", "1", "--port", str(port), "--warm"],
            stderr=shown,
            stdout=shown,
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
        )
        try:
            until(lambda: "listening" in (tmp_path / "shown").read_text(), 120)
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http, ThreadPoolExecutor() as pool:
                body = {"prompt": "a", "steps": 300}
                drawing = pool.submit(http.post, "/v1/images/generations", json=body)
                until(lambda: metric(http, "diffoundry_moving_images") == 1)
                process.send_signal(signal.SIGTERM)
                assert len(json.loads(drawing.result().content)["data"]) == 1
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    lines = (tmp_path / "shown").read_text().splitlines()
    assert not [line for line in lines if line.startswith(("Error:", "Traceback"))]
