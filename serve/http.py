"""uvicorn as it is needed here: connections that ask for nothing end, and so does the server when it is told twice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from .queue import Queue

_LOOK_S = 30.0
"""Between looks at a connection."""
_ANSWERS_S = 5.0
"""For the answers, once nothing is drawn any more."""
_BACKLOG, _AT_ONCE = 2048, 1
"""Connections that the system keeps until they are taken, and those that asyncio takes before it looks at any: where
there is no descriptor for them it tries each again a second later, and all at once again."""
_OTHER_FILES, _MOST = 128, 100_000
"""Descriptors that are left for files and engines, and the most connections where descriptors have no bound."""


def most_connections() -> int:
    """How many there may be: where a process runs out of descriptors, asyncio fills the log and little else."""
    try:
        import resource
    except ImportError:
        return _MOST
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if most == resource.RLIM_INFINITY else min(max(most - _OTHER_FILES, most // 2), _MOST)


class Connection(H11Protocol):
    """A connection. It is closed where no request begins, or none of the answer is read: a process has few of them.

    Where there are as many as there may be, the one that has asked for nothing for longest makes room.
    """

    most = most_connections()
    idle_since = 0.0
    _look: asyncio.TimerHandle
    _idle_after: Any = None
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look = self.loop.call_later(_LOOK_S, self._watch)
        self.idle_since = self.loop.time()
        if len(self.connections) > self.most:
            others = (each for each in self.connections if isinstance(each, Connection) and each is not self)
            idle = [each for each in others if each.is_idle]
            min(idle, key=lambda each: each.idle_since, default=self).transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether no request is answered."""
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """End it where it stands as it did at the last look, between requests or amid an answer."""
        unread, is_idle = self.transport.get_write_buffer_size(), self.is_idle
        if (is_idle and self._idle_after is self.cycle) or (unread and unread == self._unread):
            self.transport.abort()
            return
        self._idle_after, self._unread = self.cycle if is_idle else self, unread
        self._look = self.loop.call_later(_LOOK_S, self._watch)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing, for there are no WebSockets here."""


class Server(uvicorn.Server):
    """A server that ends when what is there is drawn, and with the step that is being made when it is told again."""

    def __init__(self, app: ASGIApp, queue: Queue[Any], drain: float, say: Callable[[str], None]) -> None:
        """queue: of what is drawn. drain: seconds for it. say: shows a line."""
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="on",
                backlog=_AT_ONCE,
                server_header=False,
                timeout_keep_alive=int(2 * _LOOK_S),
                timeout_graceful_shutdown=int(drain + _ANSWERS_S),
            )
        )
        self._queue, self._seconds, self._say = queue, drain, say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. For asyncio both of the numbers are one."""
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing more, draw what is there, answer."""
        if self._queue.present:
            self._say(f"ending when all is drawn, in {self._seconds:g} s at most; Ctrl-C ends it at once")
        waiting = [
            asyncio.create_task(asyncio.to_thread(self._queue.drain, self._seconds)),
            asyncio.create_task(self._hurried()),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for each in waiting:
                each.cancel()
            if self.force_exit:  # a thread that waits would be waited for
                await asyncio.to_thread(self._queue.drain, 0.0)

    async def _hurried(self) -> None:
        """Draw no more once the server is told to end at once."""
        while not self.force_exit:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._queue.drain, 0.0)
