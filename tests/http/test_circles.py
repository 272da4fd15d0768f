"""What a request held is gone with it, and does not wait for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any
from weakref import ref

import pytest
from served import until
from starlette.types import ASGIApp, Message

from neuronpedia_inference.operations import OPERATIONS, Operation, answer_events, answer_pieces, by_name, core
from neuronpedia_inference.operations.core import validate_in_turns
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.schemas.common import Wire
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web import body as web_body
from neuronpedia_inference.web.app import create_app
from neuronpedia_inference.web.fields import example_of
from neuronpedia_inference.web.parsing import parsed


class Watched(dict[str, Any]):
    """What of a body can be watched, its lists too."""


class WatchedList(list[Any]):
    pass


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
def test_a_refused_body_is_gone(app: ASGIApp, operation: Operation[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[ref[Any]] = []

    def watched(raw: bytes) -> Generator[None, None, Any]:
        body = Watched((name, WatchedList(value)) for name, value in (yield from parsed(raw)).items())
        held.extend(map(ref, (body, *body.values())))
        return body

    monkeypatch.setattr(web_body, "parsed", watched)
    field = next(iter(operation.request.model_fields))
    body = json.dumps({field: [str(number) for number in range(50_000)]}).encode()
    assert asyncio.run(ask(app, operation.path, body)) in (400, 413, 422)
    assert len(held) == 2
    until(lambda: not any(one() is not None for one in held))


@pytest.mark.parametrize("hangs_up", [False, True])
@pytest.mark.parametrize("name", ["activations", "activation_all", "top_k", "score", "capture", "steer_completion"])
def test_a_request_is_gone_with_its_answer_and_with_its_caller(
    app: ASGIApp, name: str, hangs_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[ref[Any]] = []

    async def watched(operation: Operation[Any], body: object) -> Wire:
        request = await validate_in_turns(operation, body)
        held.append(ref(request))
        return request

    monkeypatch.setattr(core, "validate_in_turns", watched)
    body = json.dumps(example_of(by_name[name].request)).encode()
    status = asyncio.run(ask(app, by_name[name].path, body, hangs_up=hangs_up))
    assert status == 200 or (hangs_up and status is None), "who hangs up may come too late"
    assert len(held) == 1 or (hangs_up and not held), "and too early"
    until(lambda: not any(one() is not None for one in held))


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
