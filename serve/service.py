"""What the routes share: from a body to a ticket, from its events to answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse

from ..common.errors import DiffoundryError
from .body import read_body
from .errors import Refusal, refusal
from .fields import Asked, check_plans, check_size, field_in, model_name, read_fields
from .guard import client_of
from .kept import Kept
from .models import Model, Models
from .pictures import FORMATS, Upload, encoded
from .queue import Queue
from .tickets import Ended, Event, Ticket

_AT_ONCE = 4
"""Requests whose pictures are read at the same time. Those without any do not wait for them."""
_PICTURED = frozenset({"image", "mask", "mask_image", "control", "image_prompt"})
_ALIVE_S = 15.0
"""After so long without an event a stream says that it is still there."""


@dataclass(slots=True)
class Service:
    """A server's models, the thread that draws, and what it keeps. version: of diffoundry, for the records."""

    models: Models
    scheduler: Queue[Any]
    version: str = ""
    kept: Kept = field(default_factory=Kept)
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    async def ticket(self, request: Request, needs: tuple[str, ...], *, url: str = "b64_json") -> tuple[Ticket, Asked]:
        """What the body of `request` asks for, checked, and not submitted. needs: fields that must be there.

        Raises `Refusal` and `DiffoundryError` for what cannot be drawn.
        """
        given = await read_body(request)
        model = self.models.named(model_name(given))
        request.scope["diffoundry"]["model"] = model.name
        for name in needs:
            if given.get(name) is None:
                raise Refusal(400, f"{name} is needed: give it", code="missing_required_parameter", param=name)
        client, priority = client_of(request.scope)
        async with self.reading if _PICTURED & given.keys() else contextlib.nullcontext():
            try:
                asked, ticket = await run_in_threadpool(_checked, given, model, client, priority, url)
            except DiffoundryError as error:
                refused = refusal(error, hidden(model))
                if refused.status == 400:
                    refused.param = refused.param or field_in(refused.message)
                raise refused from None
        if asked.deadline is not None:
            ticket.deadline = time.monotonic() + asked.deadline
        request.scope["diffoundry"] |= {"images": ticket.count, "steps": ticket.job.table.steps}
        return ticket, asked

    async def file(self, ticket: Ticket, asked: Asked, index: int) -> bytes:
        """Image `index` of a ticket as a file."""
        record = record_of(ticket) | {"seed": ticket.job.seeds[index], "count": 1, "diffoundry": self.version}
        return await run_in_threadpool(
            encoded, ticket.images[index], asked.output_format, asked.output_compression, record
        )

    async def keep(self, ticket: Ticket, asked: Asked, index: int) -> str:
        """The name under which the file of image `index` is kept."""
        return self.kept.put(await self.file(ticket, asked, index), FORMATS[asked.output_format])

    async def described(self, request: Request, ticket: Ticket, asked: Asked, index: int) -> dict[str, Any]:
        """Image `index` as it is answered: its seed, and its file or where the file is."""
        seed = {"seed": ticket.job.seeds[index]}
        if asked.response_format == "b64_json":
            return {**seed, "b64_json": base64.b64encode(await self.file(ticket, asked, index)).decode()}
        return {**seed, "url": str(request.url_for("kept", name=await self.keep(ticket, asked, index)))}


def _checked(given: Mapping[str, Any], model: Model, client: str, most_priority: int, url: str) -> tuple[Asked, Ticket]:
    asked = read_fields(given, model, most_priority=most_priority, url=url)
    job = model.pipeline.job(asked.request)
    check_size(job.size)
    check_plans(job.size, model)
    return asked, Ticket(
        model,
        job,
        client=client,
        mark=_mark(given),
        priority=asked.priority,
        partial_images=asked.partial_images,
    )


def _mark(given: Mapping[str, Any]) -> str:
    """What is the same for the same fields."""

    def of_file(value: Any) -> str:
        return hashlib.sha256(value.data).hexdigest() if isinstance(value, Upload) else str(value)

    return hashlib.sha256(json.dumps(given, sort_keys=True, default=of_file).encode()).hexdigest()


def hidden(model: Model) -> dict[str, str]:
    """Paths that errors may speak of, and what a client is told in their place."""
    return {**{path: name for name, path in model.loras.items()}, str(model.pipeline.bundle.root): model.name}


def record_of(ticket: Ticket) -> dict[str, Any]:
    """What makes the pictures again, as JSON values."""
    names = {path: name for name, path in ticket.model.loras.items()}
    record = {**ticket.job.record, "model": ticket.model.name}
    if "loras" in record:
        record["loras"] = [{**each, "file": names.get(each["file"], "")} for each in record["loras"]]
    return record


class Events:
    """The events of a ticket from now on, the last of which is `Ended`; None now and then where nothing happens."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket, self._loop = ticket, asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        ticket.listeners.append(self._listen)
        self._was_over = ticket.is_over

    def _listen(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Event | None]:
        event: Event | None = Ended() if self._was_over else None
        try:
            while not isinstance(event, Ended):
                try:
                    event = await asyncio.wait_for(self._queue.get(), _ALIVE_S)
                except asyncio.TimeoutError:
                    event = None
                if not isinstance(event, Ended):
                    yield event
            yield event
        finally:
            self._ticket.listeners.remove(self._listen)


def sse(name: str, value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


ALIVE = b": still here\n\n"
"""A comment, which clients leave out."""


def stream(content: AsyncIterator[bytes]) -> StreamingResponse:
    """An answer of server-sent events."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(content, media_type="text/event-stream", headers=headers)


async def gone(request: Request) -> None:
    """Return when the client has gone away. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def failure(ticket: Ticket) -> Refusal:
    """Why a ticket that is over has no pictures."""
    if ticket.error is not None:
        return refusal(ticket.error, hidden(ticket.model))
    return Refusal(503, "the request was cancelled", "server_error", "cancelled", headers={"x-should-retry": "false"})


def side(image: Image.Image) -> str:
    """A size as OpenAI's API says it."""
    return f"{image.width}x{image.height}"
