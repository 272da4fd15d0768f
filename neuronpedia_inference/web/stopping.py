"""The end of a server: those inside get time, then an error that says so; a second SIGINT waits for nobody."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from neuronpedia_inference.errors import NotReady
from neuronpedia_inference.exits import by_signal, leave

log = logging.getLogger(__name__)

FAREWELL_S = 2.0
"""How long those who were cut off have to take their error."""


class Inside:
    """The requests that are being answered."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_over = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The request of the running task. Raises NotReady once the time of those inside is over."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            task.uncancel()
            raise NotReady("The server stopped before this answer was complete. Try again soon.") from None
        finally:
            self._tasks.discard(task)

    def end(self) -> int:
        """End them all; how many there were."""
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        return len(self._tasks)


class EndsWithServer:
    """Below the boundary, which makes an answer or an event of the error."""

    def __init__(self, app: ASGIApp, inside: Inside) -> None:
        self.app = app
        self._inside = inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._inside.entered():
            await self.app(scope, receive, send)


class Server(uvicorn.Server):
    """Its handlers of signals are to be installed by whoever runs it, for longer than it runs: see `signals`."""

    def __init__(self, config: uvicorn.Config, inside: Inside, drain_s: float) -> None:
        """drain_s: how long running requests may go on once the server is to stop."""
        # uvicorn's own limit cancels requests without a word; here it is behind ours.
        config.timeout_graceful_shutdown = math.ceil(drain_s + 2 * FAREWELL_S)
        super().__init__(config)
        self._inside = inside
        self._drain_s = drain_s
        self._is_signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_signalled and sig == signal.SIGINT:
            leave(by_signal(sig))
        self._is_signalled = self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._drain_s)
        n_inside = self._inside.end()
        if n_inside:
            log.warning("DRAIN_TIMEOUT is over: who is inside gets an error", extra={"requests": n_inside})
        await asyncio.sleep(FAREWELL_S)
        for connection in self.server_state.connections:
            connection.transport.abort()


@contextmanager
def signals(server: uvicorn.Server) -> Iterator[None]:
    """SIGINT and SIGTERM stop `server`. What is done after it has ended is inside too, so that no signal cuts it."""
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
