"""Running the application on a port, with the model loading beside it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from neuronpedia_inference.errors import EngineDied, NotReady, StartupError
from neuronpedia_inference.exits import STOPPED, leave
from neuronpedia_inference.garbage import settle, uncollected
from neuronpedia_inference.observability import start_logging, start_sentry
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.app import create_app
from neuronpedia_inference.web.server import Server, listen, signals, url_of
from neuronpedia_inference.web.stopping import Inside

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

log = logging.getLogger(__name__)

WATCH_S = 0.5
FAREWELL_S = 5.0
"""A process whose engine has died goes on saying so for this long, so that load balancers turn away from it."""
CLOSE_S = 2.0
"""How long what runs on the device has to come to its next pause once nobody is inside any more."""
Say = Callable[[str], None]


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

    def close(self) -> bool:
        """Whether everything has come to its end within CLOSE_S; loading, which nothing interrupts, has not."""
        if self._runtime is None:
            return self.failure is not None
        closing = threading.Thread(target=self._runtime.close, name="close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        return not closing.is_alive()

    def _load(self) -> Runtime:
        with uncollected():
            from neuronpedia_inference.operations.openai.asking import check_variants
            from neuronpedia_inference.runtime import Runtime

            runtime = Runtime.load(self._settings, self._note)
            with ExitStack() as unless_checked:
                unless_checked.callback(runtime.close)
                asyncio.run(check_variants(runtime))
                unless_checked.pop_all()
        settle()
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
    """Serve until SIGINT or SIGTERM, then give running requests DRAIN_TIMEOUT. Raises StartupError and EngineDied.

    `say` gets the steps of loading; `on_ready` the runtime and the seconds it took.
    """
    started = time.perf_counter()
    start_logging(settings)
    start_sentry(settings)
    listener = listen(settings.server_host, settings.server_port, settings.send_timeout_s)
    loading = LoadingRuntime(settings, say)
    inside = Inside()
    app = create_app(settings, loading, inside=inside)
    server = Server(app, settings.max_connections, inside, settings.drain_timeout_s)

    def stop() -> None:
        server.should_exit = True

    stopping = threading.Event()

    def loaded(runtime: Runtime) -> None:
        on_ready(runtime, time.perf_counter() - started)
        watch(runtime, stop, stopping)

    with signals(server):
        say(f"Listening on {url_of(listener)}")
        loading.start(loaded, stop)
        try:
            server.run(sockets=[listener])
        finally:
            stopping.set()
        if loading.engine_died:
            raise EngineDied("The device has failed or the worker has died; the log says why. Start the server again.")
        if not loading.close():
            leave(STOPPED)
    if loading.failure is not None:
        raise loading.failure
