"""Running the application on a port, with the model loading beside it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp

from neuronpedia_inference.errors import EngineDied, NotReady, StartupError
from neuronpedia_inference.observability import start_logging, start_sentry
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.app import create_app
from neuronpedia_inference.web.connections import Connection, Lobby

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

log = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPTED_AT_ONCE = 16
"""Connections accepted before those that leave for them have been closed."""
SPARE_FILES = 64
"""What the process needs beside connections: models, logs, what is accepted at once."""
SHUTDOWN_S = 30
# Longer than the minute after which load balancers drop an idle connection, so that they close it, not we.
KEEP_ALIVE_S = 75
WATCH_S = 0.5
FAREWELL_S = 5.0
"""A process whose engine has died goes on saying so for this long, so that load balancers turn away from it."""
Say = Callable[[str], None]


class HttpServer(uvicorn.Server):
    """uvicorn with bounds on connections."""

    def __init__(self, app: ASGIApp, max_connections: int) -> None:
        most = min(max_connections, _most_files() - SPARE_FILES)
        connection: Any = partial(Connection, Lobby(most))
        config = uvicorn.Config(
            app,
            http=connection,
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
            timeout_keep_alive=KEEP_ALIVE_S,
            lifespan="off",
            backlog=ACCEPTED_AT_ONCE,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio has made it as short as what is accepted at once


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


class LoadingRuntime:
    """A runtime that loads in its own thread; calling this gives it, or raises NotReady."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self.failure: StartupError | None = None
        self._settings = settings
        self._say = say
        self._step = "starting"
        self._runtime: Runtime | None = None

    def __call__(self) -> Runtime:
        if self._runtime is None:
            raise NotReady(f"The model is still loading ({self._step}). Try again in a few seconds.")
        return self._runtime

    def start(self, on_ready: Callable[[Runtime], None], on_failure: Callable[[], None]) -> None:
        """Load in the background, then call one of the two, from that thread, which may keep it."""

        def load() -> None:
            failure: StartupError | None = StartupError("The model could not be loaded; the lines above say why")
            try:
                self._runtime = self._load()
                failure = None
            except StartupError as exc:
                failure = exc
            finally:
                self.failure = failure
                if failure is not None:
                    on_failure()
            if self._runtime is not None:
                on_ready(self._runtime)

        threading.Thread(target=load, name="load", daemon=True).start()

    @property
    def engine_died(self) -> bool:
        """Of a runtime that is not closed."""
        return self._runtime is not None and not self._runtime.healthy

    def close(self) -> None:
        if self._runtime is not None:
            self._runtime.close()

    def _load(self) -> Runtime:
        from neuronpedia_inference.runtime import Runtime

        runtime = Runtime.load(self._settings, self._note)
        runtime.settle()
        return runtime

    def _note(self, step: str) -> None:
        self._step = step
        self._say(step)


def watch(runtime: Runtime, stop: Callable[[], None], stopping: threading.Event) -> None:
    """Call `stop` FAREWELL_S after the engine has died; blocks until then, or until the server is stopping anyway."""
    while runtime.healthy:
        if stopping.wait(WATCH_S):
            return
    if not stopping.is_set():
        log.critical("the engine has died, the server stops in %g s", FAREWELL_S)
        stopping.wait(FAREWELL_S)
        stop()


def serve(settings: Settings, say: Say, on_ready: Callable[[Runtime, float], None]) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests end. Raises StartupError and EngineDied.

    `say` gets the steps of loading; `on_ready` the runtime and the seconds it took.
    """
    started = time.perf_counter()
    start_logging(settings)
    start_sentry(settings)
    listener = listen(settings.server_host, settings.server_port, settings.send_timeout_s)
    loading = LoadingRuntime(settings, say)
    server = HttpServer(create_app(settings, loading), settings.max_connections)

    def stop() -> None:
        server.should_exit = True

    stopping = threading.Event()

    def loaded(runtime: Runtime) -> None:
        on_ready(runtime, time.perf_counter() - started)
        watch(runtime, stop, stopping)

    say(f"Listening on {url_of(listener)}")
    loading.start(loaded, stop)
    try:
        _run(server, listener)
    finally:
        stopping.set()
        engine_died = loading.engine_died
        if not engine_died:
            loading.close()
    if engine_died:
        raise EngineDied("The device has failed or the worker has died; the log says why. Start the server again.")
    if loading.failure is not None:
        raise loading.failure


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """uvicorn repeats the signal that stopped it: with a handler of ours in place it does not kill us mid-way."""

    def ignore(_signal: int, _frame: FrameType | None) -> None:
        pass

    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ignore) for number in wanted}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
