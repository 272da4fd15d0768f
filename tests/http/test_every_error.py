"""Every error of docs/errors.md, brought about and answered over a port; what the tests see beside them is nowhere.

The other half is in tests/conftest.py: no test may produce an error that is not documented.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import httpx
import pytest
from refusing import busy, no_jacobians
from served import (
    MODEL,
    SOURCE,
    TEXT,
    WIDTH,
    Serve,
    Served,
    Wrapped,
    connected,
    raising,
    rest_of,
    send_all,
    small_settings,
    until,
)

from neuronpedia_inference.errors import EngineFailed, NotReady, SourceComing
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.body import BODIES_AT_ONCE
from neuronpedia_inference.web.connections import MAX_FRAMING
from tests.documented import documented_errors

SINGLE = {"prompt": TEXT, "model": MODEL, "source": SOURCE, "index": "5"}
HEAD = b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Here:
    """Where errors are brought about: an open server, one with a secret, and others made for the purpose."""

    def __init__(self, server: Served, locked: Served, runtime: Runtime, serve: Serve) -> None:
        self.server, self.locked, self.runtime, self.serve = server, locked, runtime, serve

    def asked(self, path: str = "/v1/activation/single", *, method: str = "POST", **changes: object) -> httpx.Response:
        with self.server.client() as client:
            return client.request(method, path, json={**SINGLE, **changes})

    def completing(self, body: dict[str, str]) -> httpx.Response:
        with self.server.client() as client:
            return client.post("/v1/completions", json=body)

    def failing(self, failure: Exception) -> httpx.Response:
        """The worker raises it while it works on a question."""
        served = self.serve(small_settings(), lambda: Wrapped(self.runtime, ask=partial(raising, failure)))
        with served.client() as client:
            return client.post("/v1/activation/single", json=SINGLE)


def sent(served: Served, raw: bytes) -> httpx.Response:
    """What comes back for bytes that no client would send."""
    with connected(served) as connection:
        send_all(connection, raw)
        head, _, body = rest_of(connection).partition(b"\r\n\r\n")
    return httpx.Response(int(head.split()[1]), content=body)


def unauthorized(here: Here) -> httpx.Response:
    with here.locked.client("wrong") as client:
        return client.post("/v1/activation/single", json=SINGLE)


def forbidden(here: Here) -> httpx.Response:
    with here.server.client() as client:
        return client.post("/v1/activation/single", json=SINGLE, headers={"Origin": "https://example.org"})


def request_timeout(here: Here) -> httpx.Response:
    served = here.serve(small_settings(receive_timeout_s=0.1), lambda: here.runtime)
    return sent(served, HEAD + b"Content-Length: 9\r\n\r\n{")


def not_ready(here: Here) -> httpx.Response:
    def loading() -> Runtime:
        raise NotReady("The model is still loading")

    with here.serve(small_settings(), loading).client() as client:
        return client.post("/v1/activation/single", json=SINGLE)


def overloaded(here: Here) -> httpx.Response:
    """As many bodies are on their way in as there may be: all but the last byte of each."""
    served = here.serve(small_settings(max_body_bytes=1024), lambda: here.runtime)
    with ExitStack() as stack:
        for _ in range(BODIES_AT_ONCE):
            connection = stack.enter_context(connected(served))
            connection.sendall(HEAD + b"Content-Length: 1024\r\n\r\n" + b" " * 1023)
        client = stack.enter_context(served.client())
        body = json.dumps({"model": MODEL, "text": "x" * 900})
        answers: list[httpx.Response] = []

        def is_full() -> bool:
            answers.append(client.post("/v1/tokenize", content=body, headers={"Content-Type": "application/json"}))
            return answers[-1].status_code == 503

        until(is_full)
        return answers[-1]


def unavailable(here: Here) -> httpx.Response:
    with here.serve(small_settings(), lambda: Wrapped(here.runtime, healthy=False)).client() as client:
        return client.get("/ready")


def unknown_hook(here: Here) -> httpx.Response:
    return here.asked(source=None, index=None, vector=[0.1] * WIDTH, hook="blocks.99.hook_resid_post")


WAYS: dict[str, Callable[[Here], httpx.Response]] = {
    "invalid_request": lambda here: here.asked(index="4096"),
    "no_jacobian_lens": lambda here: no_jacobians(here.runtime, here.serve),
    "model_not_found": lambda here: here.completing({"model": "nobody", "prompt": "a"}),
    "busy": lambda here: busy(here.runtime, here.serve),
    "limit_exceeded": lambda here: here.asked(prompt="word " * 200),
    "malformed_http": lambda here: sent(here.server, b"\x16\x03\x01 hello\r\n\r\n"),
    "unknown_hook": unknown_hook,
    "unknown_source": lambda here: here.asked(source="99-res-4k"),
    "unknown_vector": lambda here: here.asked(
        source=None, index=None, vector="vec:sha256:" + "0" * 64, hook="blocks.15.hook_resid_post"
    ),
    "unauthorized": unauthorized,
    "forbidden": forbidden,
    "not_found": lambda here: here.asked("/v1/top_k"),
    "method_not_allowed": lambda here: here.asked("/v1/steer", method="GET"),
    "request_timeout": request_timeout,
    "conflict": lambda here: here.asked("/initialize"),
    "body_too_large": lambda here: here.asked(padding=[[]] * 20_001),
    "invalid_body": lambda here: here.asked(prompt=5),
    "head_too_large": lambda here: sent(here.server, HEAD + b"X-Long: " + b"y" * 2 * MAX_FRAMING + b"\r\n\r\n"),
    "engine_failed": lambda here: here.failing(EngineFailed("The model gave a value that is not finite")),
    "internal": lambda here: here.failing(ZeroDivisionError("nobody should read this")),
    "not_ready": not_ready,
    "out_of_memory": lambda here: here.failing(MemoryError()),
    "overloaded": overloaded,
    "source_coming": lambda here: here.failing(SourceComing("Source '1-res' is being fetched")),  # test_newcomers.py
    "unavailable": unavailable,
}


def test_there_is_a_way_to_every_documented_error_and_to_no_other() -> None:
    assert set(WAYS) == set(documented_errors())


@pytest.mark.parametrize("code", WAYS)
def test_an_error_comes_as_documented(
    server: Served, locked_server: Served, runtime: Runtime, serve: Serve, code: str
) -> None:
    answer = WAYS[code](Here(server, locked_server, runtime, serve))
    body = answer.json()
    if isinstance(body["error"], dict):  # as OpenAI's routes tell it
        told = body["error"]
        body = {"error": told["message"], "code": told["code"], "request_id": answer.headers["x-request-id"]}
    assert (body["code"], answer.status_code) == (code, documented_errors()[code])
    assert isinstance(body["error"], str)
    assert body["error"]
    assert body["request_id"]
    assert "nobody should read this" not in answer.text
