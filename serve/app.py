"""The routes of the server, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..common.errors import DiffoundryError
from . import images
from .errors import Refusal, refusal
from .guard import BROKEN, Guard, Key, explain, response_of
from .jobs import Jobs
from .page import page
from .service import Service

MOST_BYTES = 64 << 20
"""Of a body."""
DRAIN_SECONDS = 300.0


def build(
    service: Service,
    *,
    keys: Sequence[Key] = (),
    most_bytes: int = MOST_BYTES,
    origins: Sequence[str] = (),
    drain: float = DRAIN_SECONDS,
    with_page: bool = True,
) -> ASGIApp:
    """The application. keys: [] lets everybody in. origins: whose pages may ask from a browser. drain: seconds for what
    is drawn when the server ends. with_page: whether there is a page at `/`."""
    jobs = Jobs(service)
    every, one = images.models(service)
    scheduler = service.scheduler

    async def job(request: Request) -> Response:
        return await (jobs.cancel if request.method == "DELETE" else jobs.show)(request)

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        is_ready = scheduler.is_ready
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(scheduler.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.drain, drain)

    draw = "image_generation"
    routes = [
        Route("/v1/images/generations", images.endpoint(service, ("prompt",), draw), methods=["POST"]),
        Route("/v1/images/edits", images.endpoint(service, ("prompt", "image"), "image_edit"), methods=["POST"]),
        Route("/v1/images/variations", images.endpoint(service, ("image",), draw), methods=["POST"]),
        Route("/v1/images/kept/{name}", images.kept(service), name="kept"),
        Route("/v1/models", every),
        Route("/v1/models/{name:path}", one),
        Route("/v1/jobs", jobs.create, methods=["POST"]),
        Route("/v1/jobs/{id}", job, methods=["GET", "DELETE"]),
        Route("/v1/jobs/{id}/events", jobs.events),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        *([Route("/", page)] if with_page else []),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            Refusal: _refused,
            DiffoundryError: _failed,
            HTTPException: _http,
            ClientDisconnect: _gone,
            Exception: _broken,
        },
    )
    guarded: ASGIApp = Guard(app, keys=keys, metrics=scheduler.metrics, most_bytes=most_bytes, origins=origins)
    if origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "Retry-After-Ms"],
        )
    return guarded


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    explain(request, error)
    return response_of(error)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, DiffoundryError)
    refused = refusal(error)
    explain(request, refused)
    return response_of(refused)


async def _http(request: Request, error: Exception) -> Response:
    """What Starlette refuses: a path that is not there, a method that it does not take."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message = f"{path} takes {allowed}, not {request.method[:20]}"
        return response_of(Refusal(405, message, code="method_not_allowed", headers={"Allow": allowed}))
    message = f"there is nothing at {path}" if error.status_code == 404 else str(error.detail)
    return response_of(Refusal(error.status_code, message, code="not_found"))


async def _broken(request: Request, error: Exception) -> Response:
    """What no request should lead to; `Guard` logs it."""
    return response_of(BROKEN)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
