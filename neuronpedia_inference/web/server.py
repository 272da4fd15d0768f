"""uvicorn with bounds: on connections, and on how long those inside have once it is to stop."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.exits import by_signal, leave
from neuronpedia_inference.web.connections import Connection, Lobby
from neuronpedia_inference.web.stopping import Inside

log = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPTED_AT_ONCE = 16
"""Connections accepted before those that leave for them have been closed."""
SPARE_FILES = 64
"""What the process needs beside connections: models, logs, what is accepted at once."""
# Longer than the minute after which load balancers drop an idle connection, so that they close it, not we.
KEEP_ALIVE_S = 75
FAREWELL_S = 2.0
"""How long those who were cut off have to take their error."""


class Server(uvicorn.Server):
    """Its handlers of signals are to be installed by whoever runs it, for longer than it runs: see `signals`."""

    def __init__(self, app: ASGIApp, max_connections: int, inside: Inside, drain_s: float) -> None:
        """inside: the requests in `app`. drain_s: how long they may go on once the server is to stop.

        Raises StartupError where the process may open too few files.
        """
        connection: Any = partial(Connection, Lobby(min(max_connections, _most_files() - SPARE_FILES)))
        config = uvicorn.Config(
            app,
            http=connection,
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            # uvicorn's own limit cancels requests without a word; here it is behind ours.
            timeout_graceful_shutdown=math.ceil(drain_s + 2 * FAREWELL_S),
            timeout_keep_alive=KEEP_ALIVE_S,
            lifespan="off",
            backlog=ACCEPTED_AT_ONCE,
        )
        super().__init__(config)
        self._inside = inside
        self._drain_s = drain_s
        self._is_signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio has made it as short as what is accepted at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_signalled and sig == signal.SIGINT:
            leave(by_signal(sig))
        self._is_signalled = self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
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


def _most_files() -> int:
    """That this process may have open. Raises StartupError where they are too few to serve."""
    try:
        import resource
    except ImportError:  # Windows
        return 2**20
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return 2**20
    if most < SPARE_FILES + 8:
        raise StartupError(f"This process may open {most} files, too few to serve: allow {SPARE_FILES + 8} (ulimit -n)")
    return most


def listen(host: str, port: int, send_timeout_s: float = 60) -> socket.socket:
    """A bound socket, whose connections end once a peer takes nothing for so long; StartupError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol left open asyncio does not see TCP, keeps Nagle's algorithm on, and answers come 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            # A closed connection keeps its buffer until the peer reads it, which one that never reads does not do.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * send_timeout_s))
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        reason = os.strerror(exc.errno) if exc.errno else str(exc)
        raise StartupError(f"Cannot listen on {host}:{port} (SERVER_HOST, SERVER_PORT): {reason}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
