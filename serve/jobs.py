"""Jobs: to be asked for again, watched and cancelled, without a connection that stays open."""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..runtime.request import Request as Drawing
from .errors import Refusal
from .fields import Asked
from .guard import client_of
from .kept import KEPT_SECONDS
from .pictures import encoded
from .service import ALIVE, Events, Service, failure, record_of, sse, stream
from .tickets import Drawn, Ended, Event, Partial, Step, Ticket

_log = logging.getLogger("diffoundry.serve")
_MOST_ENDED = 500
_PATIENCE = 4.0
"""Jobs may take so many times as long as requests whose connection is open."""


@dataclass(slots=True)
class _Entry:
    ticket: Ticket
    asked: Asked
    key: str
    address: str
    files: list[str] = field(default_factory=list)
    until: float | None = None
    watcher: asyncio.Task[None] | None = None
    is_whole: asyncio.Event = field(default_factory=asyncio.Event)


class Jobs:
    """The jobs of a server. One that ended is forgotten with its pictures after an hour, or where many ended since.

    Then the oldest of the client that has most goes: who makes many jobs takes no pictures from those who make few.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._entries: dict[str, _Entry] = {}

    async def create(self, request: Request) -> Response:
        """`POST /v1/jobs`."""
        self._forget()
        ticket, asked = await self._service.ticket(request, (), url="url")
        if asked.stream:
            raise Refusal(400, "stream is not for jobs: read /v1/jobs/ID/events", param="stream")
        ticket.patience = _PATIENCE
        events = Events(ticket)
        self._service.scheduler.submit(ticket)
        key = client_of(request.scope)[0] if request.scope["diffoundry"]["key"] else ""
        entry = _Entry(ticket, asked, key, str(request.url_for("kept", name="x"))[:-1])
        entry.watcher = asyncio.create_task(self._watch(entry, events))
        self._entries[ticket.id] = entry
        return JSONResponse(self._described(entry), 202, {"Location": f"/v1/jobs/{ticket.id}"})

    async def show(self, request: Request) -> Response:
        """`GET /v1/jobs/{id}`."""
        entry = self._entry(request)
        if entry.ticket.is_over:
            await entry.is_whole.wait()
        return JSONResponse(self._described(entry))

    async def cancel(self, request: Request) -> Response:
        """`DELETE /v1/jobs/{id}`: its rows are free before the next step."""
        entry = self._entry(request)
        self._service.scheduler.cancel(entry.ticket)
        await entry.is_whole.wait()
        return JSONResponse(self._described(entry))

    async def events(self, request: Request) -> Response:
        """`GET /v1/jobs/{id}/events`."""
        return stream(self._events(self._entry(request)))

    async def _watch(self, entry: _Entry, events: Events) -> None:
        """Make files of the pictures of a job when it has ended."""
        async for _ in events:
            pass
        ticket = entry.ticket
        try:
            if ticket.state == "failed" and (refused := failure(ticket)).status == 500:
                _log.error("job %s failed: %s", ticket.id, refused.message)
            if ticket.state == "succeeded":
                entry.files = [await self._service.keep(ticket, entry.asked, i) for i in range(ticket.count)]
        finally:  # who asks for it waits for this
            ticket.forget()
            entry.asked = replace(entry.asked, request=Drawing())  # which holds the pictures that came with it
            entry.until = time.monotonic() + KEPT_SECONDS
            entry.is_whole.set()

    async def _events(self, entry: _Entry) -> AsyncIterator[bytes]:
        yield sse("state", self._described(entry))
        async for event in Events(entry.ticket):
            if isinstance(event, Ended):
                await entry.is_whole.wait()
                yield sse(entry.ticket.state, self._described(entry))
            elif event is not None:
                yield await self._said(entry, event)
            else:
                yield sse("state", self._described(entry)) if entry.ticket.state == "queued" else ALIVE

    async def _said(self, entry: _Entry, event: Event) -> bytes:
        if isinstance(event, Step):
            left = self._service.scheduler.outlook(entry.ticket).seconds
            return sse("step", {"step": event.step, "steps": event.steps, "seconds_left": _rounded(left)})
        if isinstance(event, Partial):
            form = entry.asked.output_format, entry.asked.output_compression, None
            data = base64.b64encode(await run_in_threadpool(encoded, event.image, *form)).decode()
            return sse("preview", {"image_index": event.index, "number": event.number, "b64_json": data})
        assert isinstance(event, Drawn)
        return sse("image", {"image_index": event.index, "seed": entry.ticket.job.seeds[event.index]})

    def _entry(self, request: Request) -> _Entry:
        """The job of a path. Raises `Refusal` for one that is not there, or of another key."""
        self._forget()
        entry = self._entries.get(request.path_params["id"])
        key = client_of(request.scope)[0] if request.scope["diffoundry"]["key"] else ""
        if entry is None or not hmac.compare_digest(entry.key, key):
            raise Refusal(404, "there is no such job: jobs are kept for an hour after they end", code="not_found")
        return entry

    def _described(self, entry: _Entry) -> dict[str, Any]:
        ticket, state = entry.ticket, entry.ticket.state
        if ticket.is_over and not entry.is_whole.is_set():
            state = "running"  # until its pictures are files
        outlook = self._service.scheduler.outlook(ticket)
        described: dict[str, Any] = {
            "id": ticket.id,
            "object": "job",
            "model": ticket.model.name,
            "created": int(ticket.created),
            "status": state,
            "place": outlook.place,
            "step": ticket.step,
            "steps": ticket.steps,
            "seconds_left": _rounded(outlook.seconds),
            "request": record_of(ticket),
        }
        if state == "succeeded":
            described |= {"images": self._images(entry), "truncated": ticket.truncated}
        if state == "failed":
            described |= failure(ticket).body()
        return described

    def _images(self, entry: _Entry) -> list[dict[str, Any]]:
        """The pictures of a job; one that was forgotten is its seed alone."""
        images: list[dict[str, Any]] = []
        for seed, name in zip(entry.ticket.job.seeds, entry.files, strict=False):
            file = self._service.kept.get(name)
            if file is None:
                images.append({"seed": seed})
            elif entry.asked.response_format == "url":
                images.append({"seed": seed, "url": entry.address + name})
            else:
                images.append({"seed": seed, "b64_json": base64.b64encode(file.data).decode()})
        return images

    def _forget(self) -> None:
        now, ended = time.monotonic(), [each for each in self._entries.values() if each.until is not None]
        left: defaultdict[str, deque[_Entry]] = defaultdict(deque)
        for entry in sorted(ended, key=lambda each: each.until or 0.0):
            if (entry.until or 0.0) <= now:
                self._drop(entry)
            else:
                left[entry.ticket.client].append(entry)
        for _ in range(sum(map(len, left.values())) - _MOST_ENDED):
            self._drop(max(left.values(), key=len).popleft())

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.ticket.id]
        for name in entry.files:
            self._service.kept.drop(name)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
