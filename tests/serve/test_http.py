"""Connections that ask for nothing, and a server that is told to end."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time

import httpx2
import pytest

from diffoundry.runtime.request import Request
from diffoundry.serve.guard import Guard
from diffoundry.serve.http import most_connections
from diffoundry.serve.tickets import Ticket
from diffoundry.tests.serve.conftest import Served, serving, until

ALIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def often(monkeypatch):
    """Connections are looked at twenty times a second."""
    monkeypatch.setattr("diffoundry.serve.http._LOOK_S", 0.05)


def connected(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=10)


def answered(connection: socket.socket) -> bytes:
    """The answer to `ALIVE`."""
    data = b""
    while not data.endswith(b"}"):
        data += connection.recv(1000)
    return data


def ended(connection: socket.socket) -> bytes:
    """All that comes until the server closes it."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            data += part
    return data


@pytest.mark.parametrize("sent", [b"", b"GET /health/live HTTP/1.1\r\nHost:", ALIVE + b"GET /"])
def test_one_that_asks_for_nothing_is_closed(idle, often, sent):
    with connected(idle) as connection:
        connection.sendall(sent)
        assert ended(connection).startswith(b"HTTP/1.1 200" if sent.startswith(ALIVE) else b"")


def test_one_that_waits_for_its_picture_is_not(idle, often):
    start = time.monotonic()
    answer = httpx2.post(f"{idle.url}/v1/images/generations", json={"prompt": "a", "steps": 100}, timeout=30)
    assert answer.status_code == 200 and time.monotonic() - start > 0.15


def test_one_whose_answer_is_not_read_is_closed(idle, often):
    with connected(idle) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 200)  # more than the system keeps on the way
        until(lambda: idle.server.server_state.connections)
        until(lambda: not idle.server.server_state.connections)


def test_one_that_asks_takes_the_place_of_one_that_does_not(idle, monkeypatch):
    until(lambda: not idle.server.server_state.connections)
    monkeypatch.setattr("diffoundry.serve.http.Connection.most", 3)
    with contextlib.ExitStack() as stack:
        first, *others = (stack.enter_context(connected(idle)) for _ in range(3))
        until(lambda: len(idle.server.server_state.connections) == 3)
        first.sendall(ALIVE)
        assert b"live" in answered(first)
        assert httpx2.get(f"{idle.url}/health/live").status_code == 200
        assert not ended(others[0]), "it was made after the first, which asked for something since"
        for each in (first, others[1]):
            each.sendall(ALIVE)
            assert answered(each).startswith(b"HTTP/1.1 200")


def test_one_that_asked_may_ask_again_a_while_later(idle):
    """Proxies and clients keep connections for longer than the 5 s of uvicorn."""
    assert idle.server.config.timeout_keep_alive == 60


def test_there_are_fewer_connections_than_descriptors():
    resource = pytest.importorskip("resource")
    files, bound = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for count, most in ((1024, 896), (64, 32)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, bound), bound))
            assert most_connections() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, bound))


def test_a_body_that_does_not_come_ends_its_connection(idle, monkeypatch):
    monkeypatch.setattr("diffoundry.serve.guard._BODY_SECONDS", 0.05)
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with connected(idle) as connection:
        connection.sendall(head)
        assert ended(connection).startswith(b"HTTP/1.1 408")


def test_bodies_are_held_up_to_a_bound_in_all(bundle_of, monkeypatch):
    """Small ones are read beside them, and others again when there is room."""
    monkeypatch.setattr("diffoundry.serve.guard._SMALL", 1000)
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    with serving({"pico": bundle_of("pico")}, app={"most_bytes": 1 << 14}) as served, contextlib.ExitStack() as stack:

        def sent(body, size=1 << 14):
            connection = stack.enter_context(connected(served))
            connection.sendall(head % size + body)
            return connection

        guard = served.server.config.loaded_app
        while not isinstance(guard, Guard):
            guard = guard.app
        others = [sent(b" " * 16_000) for _ in range(16)]
        until(lambda: guard._bodies.held == 16 * 16_000)
        answer = ended(sent(b" " * 16_000)).lower()
        assert answer.startswith(b"http/1.1 429") and b"retry-after: 1\r\n" in answer
        assert sent(b"no object", 9).recv(1000).startswith(b"HTTP/1.1 400")
        for each in others:
            each.close()
        until(lambda: not guard._bodies.held)
        assert sent(b" " * 16_000, 16_000).recv(1000).startswith(b"HTTP/1.1 400")


def test_a_server_that_is_told_to_end_twice_ends_at_once(bundle_of):
    with serving({"pico": bundle_of("pico")}) as served:
        model = next(iter(served.service.models))
        ticket = Ticket(model, model.pipeline.job(Request("a", steps=900, count=4)))
        served.service.scheduler.submit(ticket)
        until(lambda: ticket.step)
        served.server.should_exit = True
        until(lambda: served.shown)
        served.server.force_exit = True
        until(lambda: ticket.is_over, 5)
    assert ticket.state == "cancelled" and "Ctrl-C" in served.shown[0]


def test_the_log_says_what_failed(copied, caplog):
    """The client alone would know."""
    logging.getLogger("diffoundry.serve").propagate = True
    with caplog.at_level(logging.INFO, "diffoundry.serve"), serving({"pico": copied}) as served:
        (copied / "unet" / "fused.onnx").write_bytes(b"")
        (copied / "unet" / "model.onnx").write_bytes(b"")
        with httpx2.Client(base_url=served.url, timeout=30) as http:
            asked = {"prompt": "a", "steps": 1}
            assert http.post("/v1/images/generations", json=asked).status_code == 500
            assert "error" in http.post("/v1/images/generations", json={**asked, "stream": True}).text
            path = http.post("/v1/jobs", json=asked).headers["location"]
            until(lambda: http.get(path).json()["status"] == "failed")
    lines = [record.getMessage() for record in caplog.records]
    told = [json.loads(line).get("error", "") for line in lines if "generations" in line]
    assert len(told) == 2 and all("was changed after" in each for each in told)
    assert any(line.startswith("job ") and "was changed after" in line for line in lines)
