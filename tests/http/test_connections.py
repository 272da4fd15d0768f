"""Callers who hold connections, headers and bodies for nothing: before the secret is known, and after."""

from __future__ import annotations

import json
import logging
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import httpx
import pytest
from served import (
    MODEL,
    SOON_S,
    Serve,
    Served,
    connected,
    on_a_port,
    rest_of,
    running,
    send_all,
    small_settings,
    until,
)
from starlette.types import Receive, Scope, Send

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web import connections
from neuronpedia_inference.web import server as serving
from neuronpedia_inference.web.body import BODIES_AT_ONCE
from neuronpedia_inference.web.connections import MAX_FRAMING
from neuronpedia_inference.web.stopping import Inside

HEAD = b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": MODEL, "text": "Hi"}).encode()
ONE_BYTE_CHUNK = b"1\r\n \r\n"


def refusal(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)


def test_a_wrong_secret_ends_the_connection_with_the_body_unread(locked_server: Served) -> None:
    with connected(locked_server) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + ONE_BYTE_CHUNK)
        status, body = refusal(rest_of(connection))
    assert (status, body["code"]) == (401, "unauthorized")


def test_who_sends_a_large_body_to_its_end_reads_that_the_secret_is_wrong(locked_server: Served) -> None:
    for _ in range(3):
        with locked_server.client() as client:
            answer = client.post("/v1/tokenize", content=b" " * 2**24)
        assert (answer.status_code, answer.headers["connection"]) == (401, "close")


@pytest.mark.parametrize("path", [b"/nothing", b"/health", b"/initialize"])
def test_an_answer_that_did_not_wait_for_the_body_ends_the_connection(server: Served, path: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        status, body = refusal(rest_of(connection))
    assert (status, body["code"]) in [(404, "not_found"), (405, "method_not_allowed"), (409, "conflict")]


@pytest.mark.parametrize("framing", [b"Content-Length: 40\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n28\r\n"])
def test_a_body_that_stops_coming_is_given_up(runtime: Runtime, serve: Serve, framing: bytes) -> None:
    served = serve(small_settings(receive_timeout_s=0.2), lambda: runtime)
    with connected(served) as connection:
        connection.sendall(HEAD + framing + b"{")
        status, body = refusal(rest_of(connection))
    assert (status, body["code"]) == (408, "request_timeout")
    assert "RECEIVE_TIMEOUT" in body["error"]


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET /hea", HEAD])
def test_a_head_that_stops_coming_is_given_up(server: Served, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with connected(server) as connection:
        send_all(connection, begun)
        assert rest_of(connection) == b""
    monkeypatch.setattr(connections, "HEAD_S", SOON_S)
    with connected(server) as connection:  # the second request of a connection likewise
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(connections, "HEAD_S", 0.3)
        send_all(connection, begun or b"\r\n")
        assert rest_of(connection).count(b"HTTP/1.1") == 0


@pytest.mark.parametrize(
    "endless",
    [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ", b"GET /" + b"a" * 100, b"GET / HTTP/1.1\r\nA: b\r\n"],
)
def test_heads_have_a_bound(server: Served, endless: bytes) -> None:
    with connected(server) as connection:
        send_all(connection, endless)
        send_all(connection, (b"X-A: b\r\n" if endless.endswith(b"\n") else b"y" * 8) * (MAX_FRAMING // 4))
        status, body = refusal(rest_of(connection))
    assert (status, body["code"]) == (431, "head_too_large")
    assert str(MAX_FRAMING) in body["error"]


def answer_of(connection: socket.socket) -> bytes:
    """Whole: it ends with an object."""
    received = b""
    while not received.endswith(b"}"):
        received += connection.recv(2**16)
    return received


def test_the_bound_of_a_head_is_what_it_says(server: Served) -> None:
    """Counted from its first byte, on a new connection and on one that has been used, by what is sent in one go."""
    opened = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: "
    fits, *_ = heads = [opened + b"y" * (n - len(opened) - 4) + b"\r\n\r\n" for n in (MAX_FRAMING, MAX_FRAMING + 1)]
    assert [len(head) for head in heads] == [MAX_FRAMING, MAX_FRAMING + 1]
    for n_before in (0, 2):
        for head in heads:
            with connected(server) as connection:
                for _ in range(n_before):
                    connection.sendall(fits)
                    assert answer_of(connection).startswith(b"HTTP/1.1 200")
                send_all(connection, head)
                answer = answer_of(connection)
            assert answer.startswith(b"HTTP/1.1 200" if head is fits else b"HTTP/1.1 431"), (n_before, answer)


def test_a_body_that_is_nearly_all_framing_is_given_up(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            send_all(connection, ONE_BYTE_CHUNK * 2**18)
        status, body = refusal(rest_of(connection))
    assert (status, body["code"]) == (431, "head_too_large")


def test_small_chunks_are_read(server: Served) -> None:
    text = json.dumps({"model": MODEL, "text": "Hi", "padding": "x" * 2**17}).encode()
    chunks = b"".join(b"5\r\n%b\r\n" % text[at : at + 5] for at in range(0, len(text) - len(text) % 5, 5))
    last = text[len(text) - len(text) % 5 :]
    chunks += (b"%x\r\n%b\r\n" % (len(last), last) if last else b"") + b"0\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        assert rest_of(connection).startswith(b"HTTP/1.1 200")


def test_what_is_not_http_is_answered_like_everything(server: Served) -> None:
    for noise in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"nonsense\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n"):
        with connected(server) as connection:
            connection.sendall(noise)
            status, body = refusal(rest_of(connection))
        assert (status, body["code"]) == (400, "malformed_http")
        assert isinstance(body["error"], str)
        assert body["request_id"]


def test_a_broken_body_is_refused_in_place_of_an_answer(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"zz\r\n")
        assert refusal(rest_of(connection))[1]["code"] == "malformed_http"


def test_requests_that_are_sent_together_are_answered_in_order(server: Served) -> None:
    n = 3000
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(server) as connection:
        connection.settimeout(SOON_S)
        connection.sendall(one * (n - 1) + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert rest_of(connection).count(b'{"status":"healthy"}') == n


@contextmanager
def small_house(runtime: Runtime, most: int) -> Iterator[Served]:
    with running(small_settings(max_connections=most), lambda: runtime) as served:
        yield served


def test_the_one_that_has_waited_longest_goes_for_a_new_one(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with small_house(runtime, 8) as served, ExitStack() as stack:
        silent = [stack.enter_context(closing(connected(served))) for _ in range(40)]
        with served.client() as client:
            assert client.post("/v1/tokenize", content=BODY, headers={"Content-Type": "application/json"}).is_success
        assert all(rest_of(one) == b"" for one in silent[:33])  # the client's is the eighth
        until(lambda: any(record.getMessage() == "request" for record in caplog.records))
        n_records = len(caplog.records)
        more = [stack.enter_context(closing(connected(served))) for _ in range(100)]
        assert all(rest_of(one) == b"" for one in more[:92])
        assert len(caplog.records) == n_records, "connections without a request are no news"


def test_those_at_work_stay_and_a_new_one_is_told_so(runtime: Runtime) -> None:
    body = json.dumps({"prompt": "Once", "features": [], "max_new_tokens": 24, "temperature": 0}).encode()
    head = HEAD.replace(b"/v1/tokenize", b"/v1/steer") + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with small_house(runtime, 8) as served, ExitStack() as stack:
        busy = [stack.enter_context(closing(connected(served))) for _ in range(8)]
        for one in busy:
            one.sendall(head + body)
        until(lambda: runtime.describe()["requests"]["inside"] == len(busy))
        with connected(served) as late:
            status, told = refusal(rest_of(late))
        assert (status, told["code"]) == (503, "overloaded")
        assert "MAX_CONNECTIONS" in told["error"]
        assert all(rest_of(one).startswith(b"HTTP/1.1 200") for one in busy)


def test_bodies_on_their_way_in_are_admitted(runtime: Runtime, serve: Serve) -> None:
    """Bodies that never end hold no more than their bound, until they are given up."""
    most, n_more = 2**18, 4
    served = serve(small_settings(max_body_bytes=most, receive_timeout_s=SOON_S), lambda: runtime)
    part = HEAD + b"Content-Length: %d\r\n\r\n" % most + b" " * (most - 1)
    with served.client() as client, ExitStack() as stack:
        begun = [stack.enter_context(closing(connected(served))) for _ in range(BODIES_AT_ONCE + n_more)]
        for one in begun:
            send_all(one, part)
        until(lambda: len(answered(begun)) == n_more)
        for one in answered(begun):
            status, body = refusal(rest_of(one))
            assert (status, body["code"]) == (503, "overloaded")
            assert "MAX_BODY_BYTES" in body["error"]
        large = {"model": MODEL, "text": "Hi", "x": "y" * (most // 2)}
        assert client.post("/v1/tokenize", json=large).json()["code"] == "overloaded"
        next(one for one in begun if one not in answered(begun)).close()
        until(lambda: client.post("/v1/tokenize", json=large).is_success)


def answered(begun: list[socket.socket]) -> list[socket.socket]:
    return select.select([one for one in begun if one.fileno() >= 0], [], [], 0)[0]


def test_connections_are_fewer_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Never asked."""

    monkeypatch.setattr(resource, "getrlimit", lambda _: (serving.SPARE_FILES + 9, 4096))
    with on_a_port(app, 60.0) as (_, url), ExitStack() as stack:
        address = httpx.URL(url)
        made = [stack.enter_context(socket.create_connection((address.host, address.port))) for _ in range(10)]
        assert rest_of(made[0]) == b""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (serving.SPARE_FILES, 4096))
    with pytest.raises(StartupError, match="ulimit -n"):
        serving.Server(app, 1000, Inside(), drain_s=0)
