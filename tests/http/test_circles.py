"""What a request held is gone with it, and does not wait for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from served import until
from starlette.types import ASGIApp, Message

from neuronpedia_inference.operations import OPERATIONS, Operation, answer_events, answer_pieces, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.app import create_app
from neuronpedia_inference.web.fields import example_of

N_OBJECTS = 50_021
"""No other list has so many."""


@pytest.fixture(scope="module")
def app(runtime: Runtime) -> ASGIApp:
    return create_app(Settings.read(), lambda: runtime)


@pytest.fixture(autouse=True)
def uncollected(runtime: Runtime) -> Iterator[None]:
    """Whose caller hung up leaves at the device's next pause, which may be after the test that asked."""
    until(lambda: n_inside(runtime) == 0)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def n_inside(runtime: Runtime) -> int:
    return runtime.describe()["requests"]["inside"]


async def ask(app: ASGIApp, path: str, body: bytes, *, hangs_up: bool = False) -> int | None:
    """The status. Nothing of a client is left behind."""
    statuses: list[int] = []
    bodies = [body]

    async def receive() -> Message:
        if not bodies and hangs_up:
            return {"type": "http.disconnect"}
        if not bodies:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
    }
    await app(scope, receive, send)
    return statuses[0] if statuses else None


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one.method == "POST"], ids=lambda one: one.name)
def test_a_refused_body_is_gone(app: ASGIApp, operation: Operation[Any]) -> None:
    field = next(iter(operation.request.model_fields))
    body = json.dumps({field: [str(number) for number in range(N_OBJECTS)]}).encode()
    assert asyncio.run(ask(app, operation.path, body)) in (400, 413, 422)
    assert not [one for one in gc.get_objects() if type(one) is list and len(one) == N_OBJECTS]


def n_requests(operation: Operation[Any]) -> int:
    return sum(type(one) is operation.request for one in gc.get_objects())


@pytest.mark.parametrize("hangs_up", [False, True])
@pytest.mark.parametrize("name", ["activations", "activation_all", "top_k", "score", "capture", "steer_completion"])
def test_a_request_is_gone_with_its_answer_and_with_its_caller(app: ASGIApp, name: str, hangs_up: bool) -> None:
    operation = by_name[name]
    body = json.dumps(example_of(operation.request)).encode()
    before = n_requests(operation)
    status = asyncio.run(ask(app, operation.path, body, hangs_up=hangs_up))
    assert status == 200 or (hangs_up and status is None), "who hangs up may come too late"
    until(lambda: n_requests(operation) == before)


@pytest.mark.parametrize("ask_for", [answer_pieces, answer_events])
def test_an_answer_that_is_dropped_gives_its_room_back(runtime: Runtime, ask_for: Callable[..., Any]) -> None:
    """As by a caller whose task is cancelled within the await that gives it."""
    body = {"prompt": "a", "features": [], "max_new_tokens": 2}

    async def ask() -> int:
        held = await ask_for(by_name["steer"], body, runtime)
        n = n_inside(runtime)
        del held
        return n

    assert asyncio.run(ask()) == 1
    until(lambda: n_inside(runtime) == 0)
