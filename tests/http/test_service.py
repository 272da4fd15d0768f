"""What every answer has whatever is asked: auth, CORS, ids, compression, bounds, and faults of our own."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import time
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from served import MODEL, SECRET, SOON_S, SOURCE, TEXT, Serve, Served, Wrapped, raising, small_settings

from neuronpedia_inference import __version__
from neuronpedia_inference.domain import FeatureActivations
from neuronpedia_inference.errors import EngineFailed, NotReady, OutOfMemory, Overloaded
from neuronpedia_inference.observability import is_reported
from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.server import listen

TOKENIZE = {"model": MODEL, "text": TEXT}
SINGLE = {"prompt": TEXT, "model": MODEL, "source": SOURCE, "index": "5"}
ORIGIN = {"Origin": "https://example.org"}
NEAR = {"Origin": "http://localhost:3000"}


def loading() -> Any:
    raise NotReady("The model is still loading")


def test_before_the_model_is_loaded(serve: Serve) -> None:
    with serve(small_settings(), loading).client() as client:
        assert client.get("/health").json() == {"status": "healthy"}
        answers = [client.get("/ready"), client.get("/v1/capabilities"), client.post("/v1/tokenize", json=TOKENIZE)]
        for answer in answers:
            assert answer.status_code == 503
            assert answer.json()["code"] == "not_ready"
            assert int(answer.headers["retry-after"]) >= 1
        assert client.post("/v1/tokenize", json={}).status_code == 422, "what is wrong anyway is said at once"


def test_when_it_is_loaded(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "healthy"}
    assert http.head("/health").status_code == 200
    assert http.get("/ready").json() == {"status": "ready", "model": MODEL}
    capabilities = http.get("/v1/capabilities").json()
    assert capabilities["sae_sets"] == ["res-4k"]
    assert capabilities["token_limit"] == small_settings().token_limit
    assert capabilities["places"]["hook_resid_post"]["writable"]["refused"] == {}
    assert capabilities["endpoints"]["tokenize"] is True


def test_a_failed_device_is_not_ready(runtime: Runtime, serve: Serve) -> None:
    with serve(small_settings(), lambda: Wrapped(runtime, healthy=False)).client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503


# Secret


@pytest.mark.parametrize("path", ["/v1/capabilities", "/metrics", "/nothing", "/health/x", "/docs/x"])
def test_what_knows_the_model_asks_for_the_secret(locked_server: Served, path: str) -> None:
    with locked_server.client() as client:
        answer = client.get(path)
        assert answer.status_code == 401
        assert "X-SECRET-KEY" in answer.json()["error"]
        assert answer.json()["code"] == "unauthorized"
    with locked_server.client(SECRET) as client:
        assert client.get(path).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_is_open(locked_server: Served, path: str) -> None:
    with locked_server.client() as client:
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_secret_that_is_not_ascii(locked_server: Served, encoding: str) -> None:
    with locked_server.client() as client:
        headers = {b"X-SECRET-KEY": SECRET.encode(encoding)}
        assert client.get("/v1/capabilities", headers=headers).status_code == 200


@pytest.mark.parametrize("wrong", [b"", b"\xff\xfe", b"a" * 5000, SECRET[:-1].encode(), SECRET.upper().encode()])
def test_a_wrong_secret(locked_server: Served, wrong: bytes) -> None:
    with locked_server.client() as client:
        assert client.get("/v1/capabilities", headers={b"X-SECRET-KEY": wrong}).status_code == 401


RIGHT = SECRET.encode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"Authorization", b"Bearer " + RIGHT)], 200),
        ([(b"authorization", b"bearer  " + RIGHT)], 200),
        ([(b"Authorization", b"Bearer " + SECRET.encode("latin-1"))], 200),
        ([(b"Authorization", b"Bearer wrong")], 401),
        ([(b"Authorization", b"Bearer")], 401),
        ([(b"Authorization", b"Basic " + RIGHT)], 401),
        ([(b"Authorization", RIGHT)], 401),
        ([(b"X-SECRET-KEY", RIGHT), (b"Authorization", b"Bearer " + RIGHT)], 200),
        ([(b"X-SECRET-KEY", RIGHT), (b"Authorization", b"Bearer wrong")], 401),
        ([(b"X-SECRET-KEY", b"wrong"), (b"Authorization", b"Bearer " + RIGHT)], 401),
        ([(b"X-SECRET-KEY", RIGHT), (b"X-SECRET-KEY", b"wrong")], 401),
        ([(b"X-SECRET-KEY", RIGHT), (b"Authorization", b"Basic of-a-proxy")], 200),
    ],
)
def test_the_secret_as_a_bearer_token(locked_server: Served, headers: list[tuple[bytes, bytes]], status: int) -> None:
    """Whatever is sent must be right; other kinds of authorization are somebody else's."""
    with locked_server.client() as client:
        answer = client.get("/v1/capabilities", headers=httpx.Headers(headers))
    assert answer.status_code == status
    assert ("sources" in answer.json()) == (status == 200)


def test_the_secret_comes_before_the_body(locked_server: Served) -> None:
    with locked_server.client() as client:
        assert client.post("/v1/tokenize", content=b"{").status_code == 401


# CORS and ids


def test_preflight_passes_without_the_secret(locked_server: Served) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-secret-key"}
    with locked_server.client() as client:
        answer = client.options("/v1/tokenize", headers={**ORIGIN, **asked})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-secret-key" in answer.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in answer.headers


def test_every_answer_can_be_read_by_a_browser(locked_server: Served, http: httpx.Client) -> None:
    with locked_server.client() as client:
        answers = [client.get("/v1/capabilities", headers=ORIGIN)]
    answers.append(http.get("/nothing", headers=NEAR))
    answers.append(http.post("/v1/tokenize", content=b"{", headers=NEAR))
    answers.append(http.post("/v1/tokenize", json=TOKENIZE, headers=NEAR))
    assert [answer.status_code for answer in answers] == [401, 404, 422, 200]
    assert all(answer.headers["access-control-allow-origin"] == "*" for answer in answers)
    assert all("x-request-id" in answer.headers["access-control-expose-headers"].lower() for answer in answers)


def test_request_ids(http: httpx.Client) -> None:
    ids = [http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    kept = http.get("/nothing", headers={"X-Request-Id": "trace:1.2_3-4"})
    assert kept.headers["x-request-id"] == kept.json()["request_id"] == "trace:1.2_3-4"
    for insane in ("a b", "x" * 129, "é", "<script>"):
        answer = http.get("/health", headers={b"X-Request-Id": insane.encode()})
        assert answer.headers["x-request-id"] not in (insane, "")


# Bodies


def test_answers_are_compressed_when_large(http: httpx.Client) -> None:
    vector = {"model": MODEL, "source": SOURCE, "index": 5}
    with http.stream("POST", "/v1/util/sae-vector", json=vector, headers={"Accept-Encoding": "gzip"}) as answer:
        packed = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == "gzip"
        assert len(json.loads(gzip.decompress(packed))["vector"]) == 576
    small = http.post("/v1/tokenize", json={"model": MODEL, "text": "Hi"})
    assert "content-encoding" not in small.headers
    plain = http.post("/v1/util/sae-vector", json=vector, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers


def test_a_body_over_the_bound_is_refused_unread(runtime: Runtime, serve: Serve) -> None:
    served = serve(small_settings(max_body_bytes=2000), lambda: runtime)
    with served.client() as client:
        fits = client.post("/v1/tokenize", json={"model": MODEL, "text": TEXT, "padding": "x" * 1000})
        assert fits.status_code == 200
    host, port = served.url.removeprefix("http://").split(":")
    head = b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    announced = head + b"Content-Length: 99999999999\r\n\r\n{"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + b" " * 1024 + b"\r\n") * 3
    for request in (announced, chunked):
        with socket.create_connection((host, int(port)), timeout=300) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 413")
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert body["code"] == "body_too_large"
        assert "2000" in body["error"]


def test_a_client_that_sends_a_large_body_to_its_end_reads_the_refusal(runtime: Runtime, serve: Serve) -> None:
    """Closed with bytes unread, a connection is reset, and most clients then never see the answer."""
    with serve(small_settings(max_body_bytes=2000), lambda: runtime).client() as client:
        for _ in range(3):
            answer = client.post("/v1/tokenize", json={"model": MODEL, "text": TEXT, "padding": "x" * 2**24})
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


# Faults of our own


@pytest.mark.parametrize(
    ("exc", "status", "code"),
    [
        (Overloaded("Full"), 503, "overloaded"),
        (OutOfMemory("The device is out of memory"), 503, "out_of_memory"),
        (EngineFailed("The engine failed"), 500, "engine_failed"),
        (RuntimeError("secret detail at /srv/app/model.py"), 500, "internal"),
        (ValueError("1 validation error"), 500, "internal"),
    ],
)
def test_a_fault_is_answered_and_the_next_request_served(
    runtime: Runtime, serve: Serve, caplog: pytest.LogCaptureFixture, exc: Exception, status: int, code: str
) -> None:
    faulty = Wrapped(runtime, ask=partial(raising, exc))
    with serve(small_settings(), lambda: faulty).client() as client, caplog.at_level(logging.ERROR):
        answer = client.post("/v1/activation/single", json=SINGLE)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert "detail at" not in answer.text
        assert "validation" not in answer.text
        assert client.post("/v1/tokenize", json=TOKENIZE).status_code == 200
    logged = [record for record in caplog.records if record.exc_info and record.exc_info[1] is exc]
    assert len(logged) == is_reported(exc)


def test_numbers_that_json_cannot_say(runtime: Runtime, serve: Serve) -> None:
    async def not_a_number(question: Any) -> list[FeatureActivations]:
        return [FeatureActivations(np.full(len(prompt), np.nan)) for prompt in question.prompts]

    broken = Wrapped(runtime, ask=not_a_number)
    with serve(small_settings(), lambda: broken).client() as client:
        answer = client.post("/v1/activation/single", json=SINGLE)
    assert answer.status_code == 500
    assert "not finite" in answer.json()["error"]


def request_lines(caplog: pytest.LogCaptureFixture, n_lines: int) -> list[dict[str, Any]]:
    """A line is written once its answer has gone out, so perhaps after the client has it."""
    until = time.monotonic() + SOON_S
    while True:
        lines = [vars(record) for record in caplog.records if record.getMessage() == "request"]
        if len(lines) >= n_lines or time.monotonic() > until:
            return lines
        time.sleep(0.005)


def test_log_lines_hold_no_prompt(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "neuronpedia_inference"):
        http.post("/v1/activation/single", json={**SINGLE, "prompt": "xylophone"}, headers={"X-Request-Id": "log-1"})
        http.post("/v1/activation/single", json={**SINGLE, "prompt": "xylophone", "index": "xylophone"})
        lines = request_lines(caplog, 2)
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["path"] == "/v1/activation/single"
    assert lines[0]["ms"] > 0
    assert lines[0]["out_bytes"] > 100
    assert "xylophone" not in str(lines)


# Documents


def test_documents(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["info"]["version"] == __version__
    documented = {item[method]["operationId"] for item in document["paths"].values() for method in item}
    assert documented >= {*(operation.name for operation in OPERATIONS), "initialize"}
    assert document["components"]["securitySchemes"]["SimpleSecretAuth"]["name"] == "X-SECRET-KEY"
    assert http.get("/docs").text == http.get("/redoc").text


def test_answers_are_not_held_back(server: Served) -> None:
    """Nagle's algorithm would add its 40 ms to every answer."""
    listener = listen("127.0.0.1", 0)
    try:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio knows to set TCP_NODELAY
    finally:
        listener.close()
