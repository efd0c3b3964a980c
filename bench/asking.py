"""A server in a process of its own, requests whose pictures are known, and the ways in which clients ask for them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.arrays import Array
from ..common.errors import BenchError
from ..runtime.control import Control
from ..runtime.lora import Lora
from ..runtime.pipeline import Pipeline
from ..runtime.request import Request

STEPS = 4, 20, 50
_PROMPTS = ("a large red star at the left", "a small white ring", "a green heart on a navy background")
WAYS = {"whole": 44, "stream": 15, "job": 12, "watched": 8, "cancelled": 7, "left": 6, "damaged": 8}
"""What is done with a request, and how often of a hundred."""
_SECONDS = 120.0
"""After so long without an answer a request is lost."""
_GENERATIONS, _EDITS, _JOBS = "/v1/images/generations", "/v1/images/edits", "/v1/jobs"
_DAMAGED: tuple[tuple[str, bytes, str], ...] = (
    (_GENERATIONS, b"{", "application/json"),
    (_GENERATIONS, b'{"prompt": "a", "steps": -4}', "application/json"),
    (_GENERATIONS, b'{"prompt": "a", "size": "63x1"}', "application/json"),
    (_GENERATIONS, b'{"prompt": 7, "nothing": NaN}', "application/json"),
    (_GENERATIONS, b"prompt", "text/plain"),
    (_EDITS, b'{"prompt": "a", "image": "bm8gcGljdHVyZQ=="}', "application/json"),
    (_EDITS, b"--x\r\nContent-Disposition: form-data", "multipart/form-data; boundary=x"),
    (_JOBS, b'{"prompt": "a", "stream": true}', "application/json"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A request, as the server is asked, and the picture that it must give, uint8 (H, W, 3)."""

    path: str
    fields: Mapping[str, Any]
    steps: int
    wanted: Array


def cases(pipe: Pipeline, sizes: Sequence[tuple[int, int]], control: str | None, lora: str | None) -> list[Case]:
    """About thirty distinct requests of all kinds that the bundle can draw, and their pictures."""
    edges = Image.new("RGB", sizes[0])
    width, height = sizes[0]
    edges.paste((255, 255, 255), (width // 4, height // 4, width - width // 4, height - height // 4))
    mask = edges.convert("L")
    own: dict[str, Any]
    kinds: list[tuple[str, dict[str, Any], dict[str, Any]]] = [(_GENERATIONS, {}, {})] * 3
    if "img2img" in pipe.bundle.manifest.tasks:
        kinds.append((_EDITS, {"image": _base64(edges), "strength": 0.7}, {"image": edges, "strength": 0.7}))
    if "inpaint" in pipe.bundle.manifest.tasks:
        own = {"image": _base64(edges), "mask": _base64(mask), "strength": 1.0}
        kinds.append((_EDITS, own, {"image": edges, "mask": mask, "strength": 1.0}))
    if control is not None:
        own = {"control": [{"name": control, "image": _base64(edges)}]}
        kinds.append((_GENERATIONS, own, {"control": [Control(control, edges)]}))
    if lora is not None:
        own = {"loras": [{"name": "lora", "strength": 0.7}]}
        kinds.append((_GENERATIONS, own, {"loras": [Lora(lora, 0.7)]}))
    found = []
    for i in range(30):
        path, fields, options = kinds[i % len(kinds)]
        steps = STEPS[i % 3]
        if not i % 2 and path == _GENERATIONS and "control" not in options:
            width, height = sizes[i // 2 % len(sizes)]
        else:
            width, height = sizes[0]
        same: dict[str, Any] = {"seed": i, "steps": steps} | (
            {} if path == _EDITS else {"width": width, "height": height}
        )
        wanted = pipe.generate(Request(_PROMPTS[i % 3], **same, **options)).images[0]
        found.append(Case(path, {"prompt": _PROMPTS[i % 3], **same, **fields}, steps, np.asarray(wanted)))
    return found


def _base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Server:
    """A server in a process of its own. shown: its last lines. errors: those that speak of something that failed."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.shown: list[str] = []
        self.errors: list[str] = []
        self.port = 0
        self._listens = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._listens.wait(300) or not self.port:
            self._process.kill()
            raise SystemExit(f"the server did not start: {' '.join(self.shown[-3:])}")

    def _read(self) -> None:
        for line in self._process.stderr or ():
            self.shown = [*self.shown[-20:], line.strip()]
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                self._listens.set()
            if "Traceback" in line or '"level"' in line:
                self.errors.append(line.strip())
        self._listens.set()

    def check(self) -> None:
        """Raise `BenchError` where its process has ended."""
        if (status := self._process.poll()) is not None:
            said = " ".join(self.shown[-3:])
            raise BenchError(f"the server ended by itself with status {status}: {said:.300}")

    def end(self) -> int:
        """End it as an administrator does. Returns its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return -9

    @contextmanager
    def asked(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> Iterator[Any]:
        """An answer, whose connection ends with the block."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": kind, "Connection": "close"})
            yield connection.getresponse()
        finally:
            connection.close()

    def json(self, method: str, path: str, fields: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """A status, and an answer in JSON."""
        with self.asked(method, path, b"" if fields is None else json.dumps(fields).encode()) as answer:
            return answer.status, json.loads(answer.read())

    def anonymous(self) -> float:
        """Bytes of its memory that are in no file, 0 where the system does not say."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines()
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        except (OSError, StopIteration):
            return 0.0

    def metrics(self) -> dict[str, float]:
        """What the server counts, by name; those with labels added up."""
        found: Counter[str] = Counter()
        with self.asked("GET", "/metrics") as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    found[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
        return dict(found)


class Refused(Exception):
    """The server is full. seconds: after which it says that there is room."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


@dataclass(slots=True)
class Tally:
    """What came of all requests. wrong: answers that should not have been. again: of those that were refused."""

    done: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    at_once: int = 0
    seconds: dict[int, list[float]] = field(default_factory=lambda: {steps: [] for steps in STEPS})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def picture(self, case: Case, data: bytes, seed: int) -> None:
        """Hold a picture, and the seed that was said, against those of its request."""
        found = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        shape = found.shape == case.wanted.shape
        apart = int(np.abs(found - case.wanted).max()) if shape else 256
        with self.lock:
            self.pictures["the same" if apart == 0 else "within 1 of 255" if apart == 1 else "another"] += 1
        if apart > 1 or seed != case.fields["seed"]:
            raise AssertionError(f"a picture of seed {case.fields['seed']} is {apart} apart, and its seed is {seed}")


class Client:
    """Sends requests to a server in all ways."""

    def __init__(self, server: Server, tally: Tally, seed: int) -> None:
        self._server, self._tally, self._rng = server, tally, np.random.default_rng(seed)
        self._do: dict[str, Callable[[Case], None]] = {
            "whole": self.whole,
            "stream": self._stream,
            "job": self._job,
            "watched": self._watched,
            "cancelled": self._cancelled,
            "left": self._left,
            "damaged": self._damaged,
        }

    def send(self, way: str, case: Case) -> None:
        """Send a request and see what comes of it; one that is refused comes again when the server says."""
        start = time.monotonic()
        with self._tally.lock:
            self._tally.at_once += 1
        try:
            for _ in range(5):
                try:
                    self._do[way](case)
                    break
                except Refused as full:
                    with self._tally.lock:
                        self._tally.done["refused"] += 1
                    time.sleep(full.seconds)
                    start = time.monotonic()
            else:
                way = "given up"
        except Exception as error:
            with self._tally.lock:
                self._tally.wrong.append(f"{way}: {type(error).__name__}: {error}"[:300])
        with self._tally.lock:
            self._tally.at_once -= 1
            self._tally.done[way] += 1
            if way in ("whole", "job", "stream", "watched"):
                self._tally.seconds[case.steps].append(time.monotonic() - start)

    @contextmanager
    def _drawn(self, path: str, fields: Mapping[str, Any], status: int = 200) -> Iterator[Any]:
        """The answer to a request that is drawn."""
        with self._server.asked("POST", path, json.dumps(fields).encode()) as answer:
            if answer.status == 429:
                raise Refused(float(answer.getheader("Retry-After") or 1))
            if answer.status != status:
                raise AssertionError(f"{path}: {answer.status} {answer.read()[:200]!r}")
            yield answer

    def whole(self, case: Case) -> None:
        """An answer that comes at once with its picture, or with the address of one."""
        form = ("b64_json", "url")[int(self._rng.integers(2))]
        with self._drawn(case.path, {**case.fields, "response_format": form}) as answer:
            [image] = json.load(answer)["data"]
        self._tally.picture(case, self._file(image), image["seed"])

    def _file(self, image: Mapping[str, Any]) -> bytes:
        if "b64_json" in image:
            return base64.b64decode(image["b64_json"])
        with self._server.asked("GET", "/" + image["url"].split("/", 3)[3]) as answer:
            return bytes(answer.read())

    def _stream(self, case: Case) -> None:
        with self._drawn(case.path, {**case.fields, "stream": True, "partial_images": 2}) as answer:
            events = list(_events(answer))
        names = [name.rpartition(".")[2] for name, _ in events]
        if set(names[:-1]) - {"partial_image"} or names[-1:] != ["completed"]:
            raise AssertionError(f"a stream had {names}")
        self._tally.picture(case, self._file(events[-1][1]), events[-1][1]["seed"])

    def _made(self, case: Case) -> str:
        with self._drawn(_JOBS, case.fields, 202) as answer:
            return str(json.load(answer)["id"])

    def _ended(self, name: str) -> dict[str, Any]:
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            status, job = self._server.json("GET", f"{_JOBS}/{name}")
            if status != 200 or job["status"] not in ("queued", "running"):
                return job
            time.sleep(0.1)
        raise AssertionError("a job did not end")

    def _job(self, case: Case) -> None:
        job = self._ended(self._made(case))
        [image] = job["images"]
        self._tally.picture(case, self._file(image), image["seed"])

    def _watched(self, case: Case) -> None:
        name = self._made(case)
        with self._server.asked("GET", f"{_JOBS}/{name}/events") as answer:
            events = list(_events(answer))
        if events[-1][0] != "succeeded":
            raise AssertionError(f"a job ended as {events[-1][0]}")
        [image] = events[-1][1]["images"]
        self._tally.picture(case, self._file(image), image["seed"])

    def _cancelled(self, case: Case) -> None:
        name = self._made(case)
        time.sleep(float(self._rng.exponential(0.1)))
        status, job = self._server.json("DELETE", f"{_JOBS}/{name}")
        if status != 200 or job["status"] not in ("cancelled", "succeeded"):
            raise AssertionError(f"a job that was cancelled: {status} {job.get('status')}")

    def _left(self, case: Case) -> None:
        """The client goes away before the answer is there."""
        stream = {"stream": True, "partial_images": 1} if self._rng.integers(2) else {}
        body = json.dumps({**case.fields, **stream}).encode()
        head = f"POST {case.path} HTTP/1.1\r\nHost: 127.0.0.1:{self._server.port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self._server.port), _SECONDS) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(float(self._rng.exponential(0.1)))

    def _damaged(self, case: Case) -> None:
        path, body, kind = _DAMAGED[int(self._rng.integers(len(_DAMAGED)))]
        with self._server.asked("POST", path, body, kind) as answer:
            text = answer.read()
            if answer.status not in (400, 415) or "error" not in json.loads(text):
                raise AssertionError(f"damaged {body!r}: {answer.status} {text[:200]!r}")


def _events(answer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and values of server-sent events."""
    name = ""
    for raw in answer:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
