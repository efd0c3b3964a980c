"""A server in this process, with a port of its own, and the official client of OpenAI's API."""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import diffoundry
from diffoundry.serve.app import build
from diffoundry.serve.http import Server
from diffoundry.serve.server import Options, make, reserve
from diffoundry.serve.service import Service


@dataclass(frozen=True)
class Served:
    """A server that runs. url: where. shown: the lines that it showed."""

    url: str
    service: Service
    server: Server
    shown: list[str]

    def client(self, key: str = "none", retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries)

    def is_idle(self) -> bool:
        """Whether nothing is left of any request."""
        scheduler = self.service.scheduler
        return not (scheduler._images or scheduler._undecoded or len(scheduler._rows))


@contextmanager
def serving(bundles: dict[str, Path], *, keys: Any = (), app: dict[str, Any] | None = None, **options: Any) -> Any:
    """A server for the time of the block."""
    service = make(Options(bundles, **options), lambda line: None)
    listener = reserve("127.0.0.1", 0)
    shown: list[str] = []
    server = Server(build(service, keys=keys, drain=10, **(app or {})), service.scheduler, 10, shown.append)
    service.scheduler.start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server, shown)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(is_true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def picture(data: str) -> np.ndarray:
    """A picture in base64 as pixels."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def png(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.fixture(scope="session")
def pipe(bundle_of) -> diffoundry.Pipeline:
    return diffoundry.load(bundle_of("pico"))


@pytest.fixture(scope="session")
def served(bundle_of) -> Iterator[Served]:
    with serving({"pico": bundle_of("pico")}, rows=4, queue=60, patience=math.inf, warm=True) as running:
        yield running


@pytest.fixture
def idle(served) -> Iterator[Served]:
    """The shared server, which must be left as it was found."""
    yield served
    until(served.is_idle)
    assert served.service.scheduler.is_ready
