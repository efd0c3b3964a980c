"""What stands before every request: its key, the size of its body, its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common.errors import RequestError
from .errors import Refusal
from .metrics import Metrics

_BODY_SECONDS = 60.0
_BODIES, _SMALL = 16, 1 << 20
"""The largest bodies that are held at the same time; one of so many bytes is read beside them in any case."""
_SHORTEST_KEY, _LONGEST_FILE, _LONGEST_ADDRESS = 16, 1 << 20, 64
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^/?#@:\sA-Z]+)(:\d{1,5})?")
_OPEN = ("/health/", "/v1/images/kept/")
_PAGE = "/"
"""What is asked for without a key. Kept pictures have names that cannot be guessed; the page asks for the key."""
_ROUTES = ("/v1/images/kept/", "/v1/jobs/", "/v1/models/")
_KNOWN = frozenset(
    {
        *("/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/models", "/v1/jobs"),
        *("/health/live", "/health/ready", "/metrics", _PAGE),
    }
)
BROKEN = Refusal(500, "the server failed; its log says why", "server_error")
_log = logging.getLogger("diffoundry.serve")


@dataclass(frozen=True, slots=True)
class Key:
    """A key, the most priority that requests with it may ask for, and how the log calls it."""

    secret: str
    name: str
    priority: int = 0


def read_keys(path: str | Path) -> list[Key]:
    """The keys in a file: one a line, with the most priority behind it where it is not 0. Lines with # are left out.

    Raises `RequestError` for a file that cannot be read, or that has no keys, wrong ones, or one twice.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LONGEST_FILE + 1).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RequestError(f"the key file {path} cannot be read ({why}): give a file with a key a line") from None
    if len(text) > _LONGEST_FILE:
        raise RequestError(f"the key file {path} has more than {_LONGEST_FILE} bytes: give a file with a key a line")
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        secret, *more = line.split() or ["#"]
        if secret.startswith("#"):
            continue
        is_key = len(secret) >= _SHORTEST_KEY and secret.isascii() and secret.isprintable()
        if not is_key or len(more) > 1 or not _is_priority(*more):
            raise RequestError(
                f"line {number} of the key file {path} must be a key of at least {_SHORTEST_KEY} letters, and after a "
                "space the most priority that it may ask for, from -10 to 10"
            )
        if secret in keys:
            raise RequestError(f"line {number} of the key file {path} is a key that is there before: leave one out")
        keys[secret] = Key(secret, f"key {len(keys) + 1}", int(more[0]) if more else 0)
    if not keys:
        raise RequestError(f"the key file {path} has no keys: write one a line")
    return list(keys.values())


def check_origins(origins: Sequence[str]) -> None:
    """Raise `RequestError` for what is no origin as a browser says it: the header would never match."""
    for each in origins:
        if each not in ("*", "null") and not _ORIGIN.fullmatch(each):
            raise RequestError(
                f"cors takes the origin of a site, such as https://example.org or http://localhost:3000, or *, found "
                f"{each!r:.100}"
            )


def _is_priority(text: str = "0") -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 4 and abs(int(text)) <= 10


def client_of(scope: Scope) -> tuple[str, int]:
    """Whose a request is, and the most priority that it may ask for."""
    key: Key | None = scope["diffoundry"]["key"]
    return (_address(scope), 10) if key is None else (key.name, key.priority)


def _address(scope: Scope) -> str:
    """Where a request comes from, which may be what a proxy says."""
    return str((scope.get("client") or ("unknown", 0))[0])[:_LONGEST_ADDRESS]


class Guard:
    """An ASGI application around another. Whatever fails inside it ends in an answer and a line in the log."""

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[Key], metrics: Metrics, most_bytes: int, origins: Sequence[str] = ()
    ) -> None:
        """keys: [] lets everybody in. most_bytes: of a body. origins: sites whose pages may ask."""
        self._app, self._keys, self._metrics, self._most, self._origins = app, keys, metrics, most_bytes, origins
        self._bodies = _Bodies(_BODIES * most_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note: dict[str, Any] = {"id": secrets.token_hex(8), "key": None}
        scope["diffoundry"] = note
        answer, body = _Answer(send, note["id"]), _Body(receive, self._most, self._bodies)
        start = time.perf_counter()
        try:
            self._check_origin(scope)
            note["key"] = self._key(scope)
            self._check_length(scope)
            await self._app(scope, body, answer)
        except Refusal as error:
            await self._refuse(error, scope, receive, answer)
        except Exception as error:
            _log.error("a request failed by %s: %s", type(error).__name__, error)
            await self._refuse(BROKEN, scope, receive, answer)
        finally:
            body.forget()
            self._note(scope, note, answer.status, time.perf_counter() - start)

    def _key(self, scope: Scope) -> Key | None:
        """The key of a request. Raises `Refusal` where it needs one and has none that is known."""
        if not self._keys or scope["path"] == _PAGE or scope["path"].startswith(_OPEN):
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, secret = given.partition(b" ")
        found = None
        for key in self._keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(key.secret.encode(), secret.strip()):
                found = key
        if found is None or scheme.lower() != b"bearer":
            raise Refusal(401, "this server needs a key: send Authorization: Bearer KEY", code="invalid_api_key")
        return found

    def _check_origin(self, scope: Scope) -> None:
        """Raise `Refusal` for a page of another site: a browser sends its forms without asking first."""
        headers = dict(scope["headers"])
        origin, host = headers.get(b"origin", b"").decode("latin-1"), headers.get(b"host", b"").decode("latin-1")
        allowed = not origin or "*" in self._origins or origin in self._origins
        if not allowed and origin.partition("://")[2] != host:
            raise Refusal(
                403,
                f"pages of {origin[:100]} may not ask here: whoever runs the server can let them, by --cors "
                f"{origin[:100]}",
            )

    def _check_length(self, scope: Scope) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15 or int(length) > self._most:
            raise _too_large(self._most)

    async def _refuse(self, error: Refusal, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if not answer.status:
            await response_of(error)(scope, receive, answer)

    def _note(self, scope: Scope, note: dict[str, Any], status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in _KNOWN else next((each + "*" for each in _ROUTES if path.startswith(each)), "other")
        self._metrics.requests.labels(route, str(status)).inc()
        key = note.pop("key")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": _address(scope),
            **({} if key is None else {"key": key.name}),
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            **note,
        }
        _log.info("%s", json.dumps(line))


def explain(request: Request, error: Refusal) -> None:
    """Let the line in the log say what failed, where it is the server's to mend: the client alone would know."""
    if error.status == 500:
        request.scope["diffoundry"]["error"] = error.message


_UNREAD = (401, 403, 408, 413)
"""Answers to what may still be on its way, and is not waited for."""


def response_of(error: Refusal) -> JSONResponse:
    """As OpenAI's API says an error."""
    headers = {**error.headers, **({"Connection": "close"} if error.status in _UNREAD else {})}
    return JSONResponse(error.body(), error.status, headers)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is too large: {math.floor(most / 2**20)} MiB are the most")


class _Answer:
    """`send`, which notes the status and says the number of the request."""

    def __init__(self, send: Send, number: str) -> None:
        self._send, self._number, self.status = send, number, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._number.encode())]
        await self._send(message)


@dataclass(slots=True)
class _Bodies:
    """The bytes of all bodies that are there, those of requests that are drawn as well. most: of them."""

    most: int
    held: int = 0


class _Body:
    """`receive`, for a body that must come within a time and a size, and find room beside the others."""

    def __init__(self, receive: Receive, most: int, bodies: _Bodies) -> None:
        self._receive, self._most, self._read, self._bodies = receive, most, 0, bodies
        self._until = time.monotonic() + _BODY_SECONDS
        self._more = True

    async def __call__(self) -> Message:
        if not self._more:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - time.monotonic()))
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not come within {_BODY_SECONDS:g} s") from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._read += size
            self._bodies.held += size
            self._more = message.get("more_body", False)
            if self._read > self._most:
                raise _too_large(self._most)
            if self._bodies.held > self._bodies.most and self._read > _SMALL:
                raise Refusal(
                    429,
                    "the server holds as much of other requests as it may: try again in 1 s",
                    "rate_limit_error",
                    headers={"Retry-After": "1", "Connection": "close"},
                )
        return message

    def forget(self) -> None:
        """Its request is answered."""
        self._bodies.held -= self._read
        self._read = 0
