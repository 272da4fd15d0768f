"""Server-sent events over a real socket: early, cumulative, honest about failures, and over when the caller leaves."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from served import MODEL, SECRET, SOON_S, SOURCE, WIDTH, Serve, Served, Wrapped, hang_up, small_settings, until, writing

from neuronpedia_inference.completion import Begun, Completion
from neuronpedia_inference.domain import Written
from neuronpedia_inference.errors import EngineFailed, Overloaded
from neuronpedia_inference.operations import answer_events, by_name
from neuronpedia_inference.runtime import Runtime
from tests.rounding import differences

STEER = {
    "prompt": "Once upon a time",
    "model": MODEL,
    "steer_method": "SIMPLE_ADDITIVE",
    "normalize_steering": False,
    "types": ["STEERED", "DEFAULT"],
    "features": [{"model": MODEL, "source": SOURCE, "index": 5, "strength": 1}],
    "n_completion_tokens": 4,
    "temperature": 0,
    "strength_multiplier": 1,
    "freq_penalty": 0,
    "seed": 16,
    "stream": True,
}
CHAT = {**STEER, "prompt": [{"role": "user", "content": "Tell me a story."}], "steer_special_tokens": False}
FRIENDLY = {"prompt": "Once upon a time", "features": [], "max_new_tokens": 4, "stream": True}
SHORT = {
    "/v1/steer/completion": "Once",
    "/v1/steer/completion-chat": [{"role": "user", "content": "Hi"}],
    "/v1/steer": "Once",
}
ROUTES = [("/v1/steer/completion", STEER), ("/v1/steer/completion-chat", CHAT), ("/v1/steer", FRIENDLY)]


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event name, data) as a plain parser reads them."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
            name = ""
        else:
            assert line == ""


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_events_are_cumulative_and_end_as_the_plain_answer(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    with http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-encoding" not in answer.headers
        events = [data for name, data in events_of(answer.iter_lines()) if name == ""]
    plain = http.post(path, json={**body, "stream": False}).json()
    assert len(events) >= 4
    assert differences(events[-1], plain) == []
    texts = [_texts(event) for event in events]
    for earlier, later in zip(texts, texts[1:], strict=False):
        assert all(after.startswith(before) for before, after in zip(earlier, later, strict=True))


def _texts(event: dict[str, Any]) -> list[str]:
    if "steered" in event:
        return [event["steered"]["text"], event["default"]["text"]]
    return [output.get("output", output.get("raw")) for output in event["outputs"]]


def test_the_bytes_of_a_stream(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/steer/completion", json={**STEER, "n_completion_tokens": 2}) as answer:
        raw = b"".join(answer.iter_raw())
    *frames, rest = raw.split(b"\n\n")
    assert rest == b""
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in frames)


def test_the_first_event_comes_before_the_last_token(http: httpx.Client) -> None:
    body = {**STEER, "prompt": "Once", "n_completion_tokens": 56}
    with http.stream("POST", "/v1/steer/completion", json=body) as answer:
        events = events_of(answer.iter_lines())
        next(events)
        assert running(http) == 1, "the event was held back to the end"
        assert len(list(events)) > 1


def test_a_pause_of_a_stream_ends_with_its_generation(runtime: Runtime) -> None:
    async def read() -> list[str]:
        async with asyncio.timeout(SOON_S):
            events = await answer_events(by_name["steer_completion"], STEER, runtime)
            first = await anext(events)
            await events.rest(2 * SOON_S)
            return ["".join(_texts(event)) for event in [first, *[event async for event in events]]]

    first, last = asyncio.run(read())
    assert len(last) > len(first)


def vectors(hook: str, value: float = 1.0) -> dict[str, Any]:
    return {"features": None, "vectors": [{"steering_vector": [value] * WIDTH, "strength": 1, "hook": hook}]}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        (vectors("blocks.99.hook_resid_post"), 400),
        (vectors("nonsense"), 400),
        ({**vectors("blocks.3.hook_resid_post", 0.0), "normalize_steering": True}, 400),
        ({"features": [{"model": MODEL, "source": "99-res-4k", "index": 1, "strength": 1}]}, 400),
        ({"features": [{"model": MODEL, "source": SOURCE, "index": 99999, "strength": 1}]}, 400),
        ({"features": None}, 400),
        ({"n_completion_tokens": 1000}, 400),
        ({"n_completion_tokens": 0}, 422),
        ({"prompt": "word " * 100}, 400),
    ],
)
def test_what_is_wrong_is_said_before_the_stream(http: httpx.Client, changes: dict[str, Any], status: int) -> None:
    answer = http.post("/v1/steer/completion", json={**STEER, **changes})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert isinstance(answer.json()["error"], str)


def test_a_stream_asks_for_the_secret(locked_server: Served) -> None:
    with locked_server.client() as client:
        assert client.post("/v1/steer/completion", json=STEER).status_code == 401
    with locked_server.client(SECRET) as client:
        assert client.post("/v1/steer/completion", json=STEER).status_code == 200


class FailingAfter:
    """`Runtime.complete` whose text raises after some events."""

    def __init__(self, runtime: Runtime, n_events: int, exc: Exception) -> None:
        self._runtime = runtime
        self._n_events = n_events
        self._exc = exc

    async def __call__(self, wanted: Completion, *, stream: bool) -> Begun:
        begun = await self._runtime.complete(wanted, stream=stream)
        return replace(begun, written=self._fail(begun.written))

    async def _fail(self, events: Any) -> AsyncIterator[Any]:
        try:
            for _ in range(self._n_events):
                yield await anext(events)
            raise self._exc
        finally:
            await events.aclose()


@pytest.mark.parametrize(
    ("exc", "code"),
    [(EngineFailed("The engine failed"), "engine_failed"), (RuntimeError("inside /srv/model.py"), "internal")],
)
def test_a_failure_after_the_first_event_is_an_error_event(
    runtime: Runtime, serve: Serve, exc: Exception, code: str
) -> None:
    broken = Wrapped(runtime, complete=FailingAfter(runtime, 2, exc))
    with (
        serve(small_settings(), lambda: broken).client() as client,
        client.stream("POST", "/v1/steer/completion", json=STEER) as answer,
    ):
        assert answer.status_code == 200
        events = list(events_of(answer.iter_lines()))
    assert [name for name, _ in events] == ["", "", "error"]
    last = events[-1][1]
    assert last["code"] == code
    assert last["request_id"] == answer.headers["x-request-id"]
    assert isinstance(last["error"], str)
    assert "model.py" not in last["error"]


def test_a_failure_before_the_first_event_has_its_own_status(runtime: Runtime, serve: Serve) -> None:
    full = Wrapped(runtime, complete=FailingAfter(runtime, 0, Overloaded("Full")))
    with serve(small_settings(), lambda: full).client() as client:
        answer = client.post("/v1/steer/completion", json=STEER)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


class Endless:
    """Events for each of so many rows, some and then nothing more; tells when it was closed."""

    def __init__(self, n_events: int) -> None:
        self.begun, self.closed = threading.Event(), threading.Event()
        self._n_events = n_events

    async def __call__(self, n_rows: int) -> AsyncIterator[tuple[Written, ...]]:
        self.begun.set()
        try:
            for _ in range(self._n_events):
                yield (Written(text="x", token_ids=(1,)),) * n_rows
            await asyncio.sleep(3600)
        finally:
            self.closed.set()


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_before_the_first_event_closes_the_generation(runtime: Runtime, serve: Serve, stream: bool) -> None:
    endless = Endless(0)
    served = serve(small_settings(), lambda: Wrapped(runtime, complete=writing(endless)))
    hang_up(served, "/v1/steer/completion", {**STEER, "stream": stream}, endless.begun.is_set)
    assert endless.closed.wait(SOON_S)


def test_hanging_up_while_nothing_comes_closes_the_generation(runtime: Runtime, serve: Serve) -> None:
    endless = Endless(2)
    served = serve(small_settings(), lambda: Wrapped(runtime, complete=writing(endless)))
    with served.client() as client, client.stream("POST", "/v1/steer/completion", json=STEER) as answer:
        events = events_of(answer.iter_lines())  # kept: dropping it would hang up
        assert len(list(itertools.islice(events, 2))) == 2
        assert not endless.closed.is_set()
    assert endless.closed.wait(SOON_S)


class Flood:
    """Events without end that say much; tells when it was closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.n_events = 0

    async def __call__(self, n_rows: int) -> AsyncIterator[tuple[Written, ...]]:
        try:
            while True:
                self.n_events += 1
                yield (Written(text="x" * 2**18),) * n_rows
        finally:
            self.closed.set()


def test_who_never_reads_holds_up_nobody_and_is_cut_off(runtime: Runtime, serve: Serve) -> None:
    """Events are made only as fast as they are taken, so what a reader does not take costs nothing either."""
    flood = Flood()
    served = serve(small_settings(send_timeout_s=2.0), lambda: Wrapped(runtime, complete=writing(flood)))
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps(STEER).encode()
    head = "POST /v1/steer/completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=SOON_S) as connection, served.client() as client:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: flood.n_events > 2)
        assert client.get("/health").json() == {"status": "healthy"}
        assert flood.closed.wait(SOON_S)
        n_made = flood.n_events
        assert client.get("/health").json() == {"status": "healthy"}
        assert flood.n_events == n_made
    assert n_made < 60, "events were made that nobody took"


def running(http: httpx.Client) -> int:
    return http.get("/v1/capabilities").json()["running"]


def cancelled(http: httpx.Client) -> int:
    return http.get("/v1/capabilities").json()["requests"]["cancelled"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_hanging_up_on_a_stream_frees_the_worker(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Before its end, or it would count as answered."""
    asked = "max_new_tokens" if path == "/v1/steer" else "n_completion_tokens"
    before = cancelled(http)
    with http.stream("POST", path, json={**body, "prompt": SHORT[path], asked: 28}) as answer:
        events = events_of(answer.iter_lines())  # kept: dropping it would hang up
        assert len(list(itertools.islice(events, 2))) == 2
        assert running(http) > 0
    until(lambda: running(http) == 0)
    assert cancelled(http) == before + 1


def test_hanging_up_on_a_plain_request_frees_the_worker(server: Served, http: httpx.Client) -> None:
    before = cancelled(http)
    body = {**STEER, "prompt": "Once", "stream": False, "n_completion_tokens": 56}
    hang_up(server, "/v1/steer/completion", body, lambda: running(http) > 0)
    until(lambda: running(http) == 0)
    assert cancelled(http) == before + 1
