"""A client of OpenAI's images API that takes the time: many streams at once, on one thread."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..common.errors import BenchError
from ..common.machine import require_modules
from .units import plain

_CONNECT_S, _SILENCE_S, _LOST_S = 20.0, 600.0, 3600.0
"""Until a connection is there, until something comes over it, and until a request that is not answered is lost."""
_MOST_BYTES, _MOST_OF_TEXT = 512 << 20, 16 << 20
"""Of an answer, or of one event of a stream; and of what has no picture."""
_KEPT_S = 1.0
"""A connection is used again within so long: servers close those that were idle for longer, which is no failure."""
_PATH = "/v1"
_STREAM = "text/event-stream"
_FILES = ("image", "mask")
_PICTURE = b'"b64_json"', b'"url"'
_LONGEST = 300


@dataclass(slots=True)
class Outcome:
    """What became of a request. first, last: when the first picture of a stream was there, partial or whole, and when
    all was, by `time.perf_counter`; None where they never were. images: whole ones.

    status: of HTTP, 0 where there was no answer. retry_after: seconds that a refusal says. error: why there is no
    picture, "" where there is one.
    """

    sent: float
    first: float | None = None
    last: float | None = None
    images: int = 0
    status: int = 0
    retry_after: float | None = None
    error: str = ""


def base_of(url: str) -> str:
    """The address below which the API is: `/v1` where `url` has no path. Raises `BenchError` for no address."""
    text = url.strip()
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one or parts.query or parts.fragment:
        raise BenchError(f"--serve takes the address of a server, such as http://127.0.0.1:8000, found {url!r:.100}")
    if parts.username is not None or parts.password is not None:
        raise BenchError("--serve takes no name and no password in the address: give keys by --api-key-file")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or _PATH}"


class Client:
    """A server, asked with any number of keys; `[""]` asks without one. Use it in `async with`."""

    def __init__(self, base: str, keys: list[str]) -> None:
        """base: see `base_of`. Raises `DiffoundryError` where the extra is not installed."""
        require_modules("bench --serve", ["httpx2"], "bench")
        import httpx2

        self.base, self._keys = base, keys
        _allow_files()
        self._http = httpx2.AsyncClient(
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEPT_S),
            timeout=httpx2.Timeout(_SILENCE_S, connect=_CONNECT_S, pool=None),
            trust_env=False,  # no proxy stands between what is measured and the clock
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self, key: int) -> dict[str, str] | None:
        """Whose each model is, by its name; None from a server that does not tell. Raises `BenchError`."""
        try:
            status, content = await asyncio.wait_for(self._listed(key), _SILENCE_S)
        except BenchError as error:
            raise BenchError(f"{self.base} is no server of OpenAI's API: {error}") from None
        except Exception as error:
            raise BenchError(f"nothing answers at {self.base} ({_why(error)}): start `diffoundry serve BUNDLE`, or "
                             "give --serve the address that it shows") from None  # fmt: skip
        if status in (401, 403):
            which = f"key {key + 1} of the file" if self._keys[key] else "requests without a key"
            raise BenchError(
                f"{self.base} refuses {which} ({_message(content)}): give --api-key-file a file with its keys"
            )
        if status in (404, 405, 501):
            return None
        try:
            return {str(each["id"]): str(each.get("owned_by", "")) for each in _object(content)["data"]}
        except Exception:
            raise BenchError(
                f"{self.base} is no server of OpenAI's API: {self.base}/models answers {status}, {_message(content)}"
            ) from None

    async def _listed(self, key: int) -> tuple[int, bytes]:
        async with self._http.stream("GET", f"{self.base}/models", headers=self._headers(key)) as answer:
            content = await _whole(answer.aiter_bytes(), _MOST_OF_TEXT)
            if (elsewhere := answer.headers.get("location")) and answer.status_code in range(300, 400):
                content = f"which points to {elsewhere}: give --serve the address that is meant".encode()
            return answer.status_code, content

    async def draw(self, fields: Mapping[str, Any], key: int, partial: int) -> Outcome:
        """Ask for pictures and wait for them. partial: pictures on their way; 0 asks for one answer, without a stream.

        What fails is told in the outcome.
        """
        outcome = Outcome(time.perf_counter())
        body = {**fields, **({"stream": True, "partial_images": partial} if partial else {})}
        try:
            await asyncio.wait_for(self._draw(body, key, outcome), _LOST_S)
        except Exception as error:  # whatever a broken connection leads the library to
            outcome.error = _why(error)
        return outcome

    async def _draw(self, body: Mapping[str, Any], key: int, outcome: Outcome) -> None:
        async with self._http.stream("POST", headers=self._headers(key), **_sent(self.base, body)) as answer:
            outcome.status = answer.status_code
            if answer.status_code != 200:
                outcome.retry_after = _seconds(answer.headers.get("retry-after"))
                outcome.error = _message(await _whole(answer.aiter_bytes(), _MOST_OF_TEXT))
            elif answer.headers.get("content-type", "").startswith(_STREAM):
                await _read_stream(answer.aiter_bytes(), outcome)
            else:
                _count(await _whole(answer.aiter_bytes(), _MOST_BYTES), outcome)

    def _headers(self, key: int) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._keys[key]}"} if self._keys[key] else {}


def _sent(base: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Where a request goes and what it holds: JSON, or a form where it has a picture."""
    files = {name: (f"{name}.png", _decoded(body[name])) for name in _FILES if name in body}
    if not files:
        return {"url": f"{base}/images/generations", "json": dict(body)}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in body.items()
        if name not in _FILES
    }
    return {"url": f"{base}/images/edits", "data": texts, "files": files}


def _decoded(text: str) -> bytes:
    from base64 import b64decode

    return b64decode(text)


async def _whole(chunks: AsyncIterator[bytes], most: int) -> bytes:
    """All of an answer. Raises `BenchError` for one of more than `most` bytes."""
    found = bytearray()
    async for chunk in chunks:
        found += chunk
        _check_length(len(found), most)
    return bytes(found)


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise BenchError(f"it answers with more than {most >> 20} MiB")


async def _read_stream(chunks: AsyncIterator[bytes], outcome: Outcome) -> None:
    """Note when the pictures of a stream are there."""
    async for name, data in _events(chunks):
        now = time.perf_counter()
        kind = name or _object(data).get("type", "")
        if kind.endswith((".partial_image", ".completed")):
            outcome.first = outcome.first or now
        if kind.endswith(".completed") and any(each in data for each in _PICTURE):
            outcome.images, outcome.last = outcome.images + 1, now
        elif kind == "error":
            outcome.error = _message(data)
    if not outcome.images and not outcome.error:
        outcome.error = "the stream ended without a picture"


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, bytes]]:
    """Server-sent events: their names, "" where they have none, and their data."""
    name, data, rest = "", b"", bytearray()
    async for chunk in chunks:
        rest += chunk
        _check_length(len(rest) + len(data), _MOST_BYTES)
        if b"\n" not in chunk:
            continue
        *lines, last = rest.split(b"\n")
        rest = bytearray(last)
        for line in lines:
            text = line.rstrip(b"\r")
            if text.startswith(b"event:"):
                name = text[6:].strip().decode(errors="replace")
            elif text.startswith(b"data:"):
                data += bytes(text[5:])
            elif not text and (name or data):
                yield name, data
                name, data = "", b""


def _count(data: bytes, outcome: Outcome) -> None:
    """Note the pictures of an answer that has all of them."""
    outcome.last = time.perf_counter()
    made = _object(data).get("data")
    outcome.images = sum(
        isinstance(each, dict) and bool(each.get("b64_json") or each.get("url"))
        for each in (made if isinstance(made, list) else [])
    )
    if not outcome.images:
        outcome.last, outcome.error = None, f"the answer has no picture: {_message(data)}"


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _message(data: bytes) -> str:
    """What an answer says of an error."""
    told = _object(data).get("error", {})
    text = told.get("message") if isinstance(told, dict) else told
    return plain(text or data[:_LONGEST].decode(errors="replace") or "it says nothing", _LONGEST)


def _seconds(text: str | None) -> float | None:
    """The seconds of a `Retry-After`; None where it has none, or a date."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _why(error: BaseException) -> str:
    """What a library's error says, or its kind."""
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)) or type(error).__name__.endswith("Timeout"):
        return "it does not answer in time"
    return plain(str(error) or type(error).__name__, _LONGEST)


def _allow_files() -> None:
    """Each open stream is an open file: take as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
