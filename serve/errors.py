"""What is said to a client when something is refused or fails, as OpenAI's API says it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..common.errors import DiffoundryError, LoraError, RequestError
from .admission import QueueFullError
from .models import NoModelError
from .queue import DrainingError
from .tickets import OverdueError

_LONGEST = 2000
_REMEDIES = (
    (r"compile the bundle again with the --steps you need, or", "ask for one of these, or"),
    (r"as in --control\S* \S+ or ", "as in "),
    (r", or --ip-embeds FILE", ""),
    (r"--(steps|scheduler)\b", r"\1"),
    (r"`diffoundry schedulers` lists", "GET /v1/models lists"),
    (r"run several in one batch with pipe\.generate_many\(.*\)", "send a request for each"),
    (r", or draw all with (the same ones, which|these LoRAs, by) .*", ""),
    (r"draw all with [\w ]+, by .*(`run --lora`|--lora-approximate|as_inputs=False\))( without it)?", "leave some out"),
    (r"fuse some with `compile --lora`", "leave some out"),
    (r"(compile (the \w+|it) again|run `(diffoundry|pip) )", r"whoever runs the server can \1"),
)
"""Remedies by the command line and in Python, and what they are for a client, or who has them."""
_INVALID, _SERVER = "invalid_request_error", "server_error"


class FieldError(RequestError):
    """A field of a request is wrong. param: its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = _INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As JSON. Halves of letters, which JSON can say and UTF-8 cannot, are written as `repr` writes them."""
        message, param = (
            text and text.encode(errors="backslashreplace").decode() for text in (self.message, self.param)
        )
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}


def refusal(error: DiffoundryError, hidden: Mapping[str, str] | None = None) -> Refusal:
    """The answer for an error. hidden: texts that are the server's own, and what is said in their place."""
    text = " ".join(str(error).split())
    for own, said in (hidden or {}).items():
        text = text.replace(own, said)
    if len(text) > _LONGEST:  # many say what they found
        text = f"{text[:_LONGEST]}…"
    for pattern, remedy in _REMEDIES:
        text = re.sub(pattern, remedy, text)
    if isinstance(error, QueueFullError):
        return Refusal(429, text, "rate_limit_error", "queue_full", headers=_when(error.seconds))
    if isinstance(error, NoModelError):
        return Refusal(404, text, code="model_not_found", param="model")
    if isinstance(error, FieldError):
        return Refusal(400, text, param=error.param)
    if isinstance(error, (RequestError, LoraError)):
        return Refusal(400, text)
    if isinstance(error, OverdueError):
        return Refusal(504, text, _SERVER, "deadline_exceeded", headers={"x-should-retry": "false"})
    if isinstance(error, DrainingError):
        return Refusal(503, text, _SERVER, "draining", headers={"Retry-After": "5"})
    return Refusal(500, text, _SERVER)


def _when(seconds: float | None) -> dict[str, str]:
    """Headers that say when to ask again: in whole seconds, and in milliseconds for the clients that know of them."""
    if seconds is None:
        return {}
    return {"Retry-After": str(max(1, math.ceil(seconds))), "Retry-After-Ms": str(math.ceil(1000 * seconds))}
