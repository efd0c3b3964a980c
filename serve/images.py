"""OpenAI's images API: generations, edits, variations, models."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .errors import Refusal
from .fields import LARGEST_SIDE, MOST_IMAGES, MOST_PIXELS, MOST_STEPS, Asked
from .guard import explain
from .models import Model
from .pictures import encoded
from .service import ALIVE, Events, Service, failure, gone, record_of, side, sse, stream
from .tickets import Drawn, Ended, Partial, Ticket

_GONE = 499
Endpoint = Callable[[Request], Awaitable[Response]]


def endpoint(service: Service, needs: tuple[str, ...], event: str) -> Endpoint:
    """A route that draws. needs: the fields that must be there. event: how the names of its events begin."""

    async def draw(request: Request) -> Response:
        ticket, asked = await service.ticket(request, needs)
        if not asked.stream:
            ticket.partial_images = 0  # for nobody would see them
        events = Events(ticket)
        service.scheduler.submit(ticket)
        if asked.stream:
            return stream(_streamed(service, request, ticket, asked, events, event))
        return await _whole(service, request, ticket, asked, events)

    return draw


async def _whole(service: Service, request: Request, ticket: Ticket, asked: Asked, events: Events) -> Response:
    """The answer when all is drawn; a client that goes away frees its rows."""

    async def ended() -> None:
        async for _ in events:
            pass

    waiting = [asyncio.ensure_future(each) for each in (ended(), gone(request))]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        service.scheduler.cancel(ticket)  # which does nothing to one that is over
        for each in waiting:
            each.cancel()
    if not ticket.is_over:
        return Response(status_code=_GONE)
    if ticket.state != "succeeded":
        raise failure(ticket)
    data = [await service.described(request, ticket, asked, i) for i in range(ticket.count)]
    return JSONResponse(
        {
            "created": int(time.time()),
            "background": "opaque",
            "data": data,
            "output_format": asked.output_format,
            "size": side(ticket.images[0]),
            "usage": usage(ticket),
            "safety_identifier": asked.user,
            "diffoundry": {"request": record_of(ticket), "truncated": ticket.truncated},
        }
    )


async def _streamed(
    service: Service, request: Request, ticket: Ticket, asked: Asked, events: Events, name: str
) -> AsyncIterator[bytes]:
    """Partial pictures and whole ones as they come; a client that goes away frees its rows."""

    def said(kind: str, index: int, size: str, more: dict[str, Any]) -> bytes:
        same = {"background": "opaque", "quality": "auto", "output_format": asked.output_format, "size": size}
        place = {"image_index": index, "seed": ticket.job.seeds[index], "created_at": int(time.time())}
        return sse(f"{name}.{kind}", {"type": f"{name}.{kind}", **same, **place, **more})

    try:
        async for event in events:
            if event is None:
                yield ALIVE
            elif isinstance(event, Partial):
                form = asked.output_format, asked.output_compression, None
                data = base64.b64encode(await run_in_threadpool(encoded, event.image, *form)).decode()
                more: dict[str, Any] = {"b64_json": data, "partial_image_index": event.number}
                yield said("partial_image", event.index, side(event.image), more)
            elif isinstance(event, Drawn):
                image = await service.described(request, ticket, asked, event.index)
                more = {**image, "usage": usage(ticket), "safety_identifier": asked.user}
                yield said("completed", event.index, side(event.image), more)
            elif isinstance(event, Ended) and ticket.state != "succeeded":
                refused = failure(ticket)
                explain(request, refused)
                yield sse("error", {"type": "error", **refused.body()})
    finally:
        service.scheduler.cancel(ticket)


def usage(ticket: Ticket) -> dict[str, Any]:
    """What was read and made. Tokens of text are those that the denoiser reads, of images the latents' positions."""
    width, height = ticket.job.size
    latents = (width * height) // ticket.model.pipeline.bundle.manifest.latents.downscale**2
    given = latents if ticket.job.picture is not None else 0
    made = latents * ticket.count
    return {
        "input_tokens": ticket.tokens + given,
        "input_tokens_details": {"text_tokens": ticket.tokens, "image_tokens": given},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": ticket.tokens + given + made,
    }


def described(model: Model) -> dict[str, Any]:
    """A model, and what it can."""
    manifest = model.pipeline.bundle.manifest
    wiring = manifest.wiring
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "diffoundry",
        "diffoundry": {
            "tasks": list(manifest.tasks),
            "width": manifest.default_width,
            "height": manifest.default_height,
            "multiple_of": manifest.latents.unit,
            "steps": manifest.default_steps,
            "guidance": manifest.default_guidance,
            "controls": list(wiring.controls),
            "image_prompts": list(wiring.image_prompts),
            "loras": list(model.loras),
            "plans": model.pipeline.plan_sizes(),
            "most": {"n": MOST_IMAGES, "steps": MOST_STEPS, "pixels": MOST_PIXELS, "side": LARGEST_SIDE},
            **model.abilities,
        },
    }


def models(service: Service) -> tuple[Endpoint, Endpoint]:
    """The routes of all models, and of one."""

    def all_of_them() -> list[dict[str, Any]]:
        return [described(model) for model in service.models]

    async def every(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await run_in_threadpool(all_of_them)})

    async def one(request: Request) -> Response:
        model = service.models.named(request.path_params["name"])
        return JSONResponse(await run_in_threadpool(described, model))

    return every, one


def kept(service: Service) -> Endpoint:
    """The route of pictures that are kept."""

    async def one(request: Request) -> Response:
        file = service.kept.get(request.path_params["name"])
        if file is None:
            raise Refusal(404, "there is no such picture: pictures are kept for an hour at most", code="not_found")
        return Response(file.data, media_type=file.media_type, headers={"Cache-Control": "private, max-age=3600"})

    return one
