"""The application on a real port, for the tests of this folder."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from neuronpedia_inference.completion import Begun, Completion
from neuronpedia_inference.domain import Tokens, Written
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.app import create_app
from neuronpedia_inference.web.server import Server, listen, url_of
from neuronpedia_inference.web.stopping import Inside

MODEL = "smollm2-135m-instruct"
SOURCE = "15-res-4k"
TEXT = "The cat sat on the mat."
SECRET = "sésame-0x5ec2e7"
WIDTH = 576
BOS = "<|im_start|>"
SOON_S = 300.0
VARIANTS = Path(__file__).parent / "variants"


@dataclass(frozen=True)
class Served:
    url: str
    settings: Settings

    def client(self, secret: str | None = None) -> httpx.Client:
        headers = {b"X-SECRET-KEY": secret.encode()} if secret is not None else None
        return httpx.Client(base_url=self.url, headers=headers, timeout=SOON_S)


Serve = Callable[[Settings, Callable[[], Any]], Served]


def small_settings(**changes: Any) -> Settings:
    """Small limits and one thread, so that a busy machine answers soon."""
    small = {"token_limit": 48, "max_tokens": 64, "num_threads": 1, "max_results": 50, "sae_sets": "res-4k"}
    return Settings.read(**{**small, "variants": VARIANTS, **changes})


@contextmanager
def running(settings: Settings, get_runtime: Callable[[], Any]) -> Iterator[Served]:
    """A uvicorn server in a thread of its own, on a free port."""
    with on_a_port(create_app(settings, get_runtime), settings.send_timeout_s, settings.max_connections) as (_, url):
        yield Served(url, settings)


@contextmanager
def on_a_port(app: Any, send_timeout_s: float, max_connections: int = 1000) -> Iterator[tuple[uvicorn.Server, str]]:
    """Any ASGI application likewise: its server and its address."""
    listener = listen("127.0.0.1", 0, send_timeout_s)
    server = Server(app, max_connections, Inside(), drain_s=30)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield server, url_of(listener)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def hang_up(served: Served, path: str, body: dict[str, Any], when: Callable[[], bool]) -> None:
    """Send a request and close its connection, unread, once `when` holds."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n"
    with connected(served) as connection:
        connection.sendall(head.encode() + b"\r\n" + content)
        until(when)


def connected(served: Served) -> socket.socket:
    address = httpx.URL(served.url)
    return socket.create_connection((address.host, address.port), timeout=SOON_S)


def rest_of(connection: socket.socket) -> bytes:
    """To the end of the connection, however it ends."""
    received = b""
    while True:
        try:
            chunk = connection.recv(2**16)
        except ConnectionResetError:
            return received
        if not chunk:
            return received
        received += chunk


def send_all(connection: socket.socket, data: bytes) -> bool:
    """False where the other end is gone before all was sent."""
    try:
        connection.sendall(data)
    except (ConnectionResetError, BrokenPipeError):
        return False
    return True


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for as long as the busiest machine may take."""
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.02)


class Wrapped:
    """A runtime with some methods replaced, everything else its own."""

    def __init__(self, runtime: Runtime, **replaced: Any) -> None:
        self._runtime = runtime
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


def writing(news: Callable[[int], AsyncIterator[tuple[Written, ...]]]) -> Callable[..., Coroutine[Any, Any, Begun]]:
    """`Runtime.complete` that writes just that: of the number of rows, what is new in each of them."""

    async def complete(wanted: Completion, *, stream: bool) -> Begun:
        nothing = Tokens((1,), ("x",), (False,), has_bos=False)
        return Begun(nothing, "", [() for _ in wanted.plans], news(len(wanted.plans)))

    return complete


async def raising(exc: Exception, *_: Any, **__: Any) -> Any:
    raise exc
