"""The control plane as a whole: servers, containers, and a thread to run them in."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib.server import Server
from modal_proto import api_pb2

from tests.modal.local_modal.calls import Calls
from tests.modal.local_modal.containers import Container
from tests.modal.local_modal.desk import Desk
from tests.modal.local_modal.front import Front
from tests.modal.local_modal.objects import Objects
from tests.modal.local_modal.records import App, Bell, Function, Pool
from tests.modal.local_modal.rpc import Service
from tests.modal.local_modal.store import Store

HOST = "127.0.0.1"
T = TypeVar("T")


class Plane:
    """Use as a context manager: `plane.env` makes any process on this machine talk to it."""

    def __init__(self, folder: Path, *, snapshots: bool = False) -> None:
        """folder: empty, for files and volumes. snapshots: take classes that allow it through a snapshot's steps."""
        self.folder = folder
        self.snapshots = snapshots
        self.fault = ""
        """Code that containers run first when they start: how a test breaks one."""
        self.at_snapshot: Callable[[Container], None] = lambda container: None
        """Called when a container says that its memory may be kept."""
        self.can_mount = _can_mount()
        self.containers: list[Container] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-modal", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sites: list[web.AppRunner] = []

    def __enter__(self) -> Plane:
        self._thread.start()
        self.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 300) -> T:
        """Run on the plane's loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def wait(self, ready: Callable[[], object], timeout_s: float = 300) -> bool:
        """Whether `ready` came true in time."""
        return self.run(self.bell.until(ready, timeout_s), timeout_s + 5)

    @property
    def env(self) -> dict[str, str]:
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": "ak-local",
            "MODAL_TOKEN_SECRET": "as-local",
            "MODAL_CONFIG_PATH": str(self.folder / "modal.toml"),
        }

    def call(self, action: Callable[[], object]) -> None:
        """Run a plain function on the plane's loop."""

        async def run() -> None:
            action()

        self.run(run())

    # Servers

    async def _start(self) -> None:
        self.bell = Bell()
        self.store = Store(self.folder)
        self.objects = Objects(self.folder)
        self.objects.on_function = self._serve_web  # type: ignore[method-assign]
        self.calls = Calls(self.objects, self.bell)
        self.store.url = await self._listen(self.store.routes())
        self.desk = Desk(self.objects)
        self._server = Server([Service(self, self.calls, self.objects, self.store, self.desk)])
        listener = socket.create_server((HOST, 0))
        port = listener.getsockname()[1]
        await self._server.start(sock=listener)
        self.url = f"http://{HOST}:{port}"
        self._starting = self._spawn(self._start_containers())

    async def _stop(self) -> None:
        self._starting.cancel()
        for container in self.containers:
            container.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        await self._server.wait_closed()
        for site in self._sites:
            await site.cleanup()

    async def _listen(self, routes: list[web.RouteDef]) -> str:
        app = web.Application(client_max_size=2**30)
        app.add_routes(routes)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._sites.append(runner)
        await web.TCPSite(runner, HOST, 0).start()
        return f"http://{HOST}:{runner.addresses[0][1]}"

    async def _serve_web(self, function: Function) -> None:
        """Each web method listens on a port of its own."""
        made = function.definition
        configs = {name: method.webhook_config for name, method in made.method_definitions.items()}
        for method, config in {"": made.webhook_config, **configs}.items():
            if config.type and method not in function.urls:
                front = Front(self.calls, function.id, method)
                function.urls[method] = await self._listen([web.route("*", "/{path:.*}", front.answer)])

    # Containers

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._loop.call_exception_handler({"message": "local control plane", "exception": task.exception()})

    async def _start_containers(self) -> None:
        """One container for each pool that has work and none."""
        while True:
            await self.bell.until(lambda: any(map(_is_wanting, self.calls.pools.values())))
            for pool in filter(_is_wanting, self.calls.pools.values()):
                container = Container(self, pool)
                pool.containers.append(container)
                self.containers.append(container)
                self._spawn(self._keep(container))

    async def _keep(self, container: Container) -> None:
        try:
            await container.run()
        finally:
            container.pool.containers.remove(container)
            self.bell.ring()

    # RPCs that end things

    async def AppClientDisconnect(self, request: api_pb2.AppClientDisconnectRequest) -> Empty:
        await self._end(self.objects.apps[request.app_id])
        return Empty()

    async def AppStop(self, request: api_pb2.AppStopRequest) -> Empty:
        await self._end(self.objects.apps[request.app_id])
        return Empty()

    async def _end(self, app: App) -> None:
        """Let the containers of an app leave, so that their last lines are in the log."""
        mine = [one for one in self.containers if one.pool.function.app is app and one.exit_code is None]
        for container in mine:
            container.stop()
        await self.bell.until(lambda: all(one.exit_code is not None for one in mine), 20)
        app.done = True
        self.bell.ring()

    async def ContainerStop(self, request: api_pb2.ContainerStopRequest) -> api_pb2.ContainerStopResponse:
        for container in self.containers:
            if container.id == request.task_id:
                container.stop()
        return api_pb2.ContainerStopResponse()


def _is_wanting(pool: Pool) -> bool:
    return bool(pool.waiting) and not pool.containers


def _can_mount() -> bool:
    """Whether a private mount namespace may be made here."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
