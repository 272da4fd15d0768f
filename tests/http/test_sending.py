"""Large answers over a real socket: in pieces, as fast as they are read, and no longer than somebody reads."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
from served import MODEL, SOURCE, TEXT, Served, on_a_port
from starlette.types import Message, Receive, Scope, Send

from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.operations import Events
from neuronpedia_inference.web.boundary import Boundary
from neuronpedia_inference.web.pieces import PiecedAnswer
from neuronpedia_inference.web.sending import StoppedReading, in_time
from neuronpedia_inference.web.server import Server, listen, url_of
from neuronpedia_inference.web.sse import EVENT_BYTES_PER_S, LARGE_BYTES, EventStream
from neuronpedia_inference.web.stopping import EndsWithServer, Inside

PIECE = b"x" * 2**15
PATIENCE_S = 300
# What the kernel's buffers of both ends and the server may hold for one connection.
BUFFERED_BYTES = 2**25


class Pieces(Events[Any, bytes]):
    """`n` pieces, the last of which fails if wanted; notes how many were made and whether it was closed."""

    def __init__(self, n: int, *, fails: bool = False) -> None:
        self.n_made = 0
        self.closed = threading.Event()
        super().__init__(self._made(n, fails), lambda piece: piece)

    async def _made(self, n: int, fails: bool) -> AsyncIterator[bytes]:
        while self.n_made < n:
            self.n_made += 1
            if fails and self.n_made == n:
                raise EngineFailed("broken")
            yield PIECE

    async def aclose(self) -> None:
        await super().aclose()
        self.closed.set()


def sending(pieces: Pieces, send_timeout_s: float = PATIENCE_S) -> Boundary:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["more_body"] is False
        await PiecedAnswer(pieces, send_timeout_s)(scope, receive, send)

    return Boundary(app)


def connected(url: str) -> socket.socket:
    """A client that has asked and reads nothing yet."""
    address = httpx.URL(url)
    client = socket.create_connection((address.host, address.port))
    client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
    return client


def until(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return holds()


def test_one_piece_is_an_ordinary_answer() -> None:
    with on_a_port(sending(Pieces(1)), PATIENCE_S) as (_, url):
        answer = httpx.get(url, timeout=PATIENCE_S)
    assert answer.headers["content-length"] == str(len(PIECE))
    assert answer.content == PIECE


def test_several_pieces_arrive_in_order_and_whole() -> None:
    pieces = Pieces(100)
    with on_a_port(sending(pieces), PATIENCE_S) as (_, url):
        answer = httpx.get(url, timeout=PATIENCE_S)
    assert "content-length" not in answer.headers
    assert answer.content == 100 * PIECE
    assert pieces.closed.is_set()


@pytest.mark.parametrize("fails", [False, True])
def test_how_long_an_answer_is_leaves_first_where_it_is_known(fails: bool) -> None:
    """So a caller knows how much is to come, and that it is not all where the connection ends before."""
    pieces = Pieces(100, fails=fails)
    pieces.n_bytes = 100 * len(PIECE)
    content = bytearray()
    with on_a_port(sending(pieces), PATIENCE_S) as (_, url), httpx.stream("GET", url, timeout=PATIENCE_S) as answer:
        assert answer.headers["content-length"] == str(pieces.n_bytes)
        assert "transfer-encoding" not in answer.headers
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete") if fails else nullcontext():
            for piece in answer.iter_raw():
                content += piece
    assert bytes(content) == (98 if fails else 100) * PIECE, "a piece leaves when the next is there"
    assert pieces.closed.is_set()


@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_before_anything_was_sent_has_its_own_status(n: int) -> None:
    with on_a_port(sending(Pieces(n, fails=True)), PATIENCE_S) as (_, url):
        answer = httpx.get(url, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed")


def test_pieces_are_made_only_as_fast_as_they_are_read() -> None:
    pieces = Pieces(100_000)
    with on_a_port(sending(pieces), PATIENCE_S) as (_, url), connected(url) as client:
        client.recv(1)
        last = -1
        while last != pieces.n_made:  # until nothing is made any more
            last = pieces.n_made
            time.sleep(0.3)
        assert last * len(PIECE) < BUFFERED_BYTES
        for _ in range(2 * BUFFERED_BYTES // len(PIECE)):
            client.recv(len(PIECE), socket.MSG_WAITALL)
        assert pieces.n_made * len(PIECE) > 2 * BUFFERED_BYTES


def test_a_caller_who_hangs_up_stops_the_answer() -> None:
    pieces = Pieces(100_000)
    with on_a_port(sending(pieces), PATIENCE_S) as (server, url):
        with connected(url) as client:
            client.recv(len(PIECE))
        assert pieces.closed.wait(PATIENCE_S)
        assert until(lambda: not server.server_state.connections)
    assert pieces.n_made < 100_000


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux drops a connection that is not read")
def test_a_caller_who_never_reads_is_cut_off_with_all_that_was_kept_for_it() -> None:
    pieces = Pieces(100_000)
    with on_a_port(sending(pieces, 0.5), 0.5) as (server, url), connected(url):
        assert pieces.closed.wait(PATIENCE_S)
        assert until(lambda: not server.server_state.connections)
    assert pieces.n_made * len(PIECE) < BUFFERED_BYTES


class Growing(Events[Any, bytes]):
    """Events of these sizes; notes for how long it was left alone between them."""

    def __init__(self, sizes: list[int]) -> None:
        self.rests: list[float] = []
        super().__init__(self._made(sizes), lambda event: event)

    async def _made(self, sizes: list[int]) -> AsyncIterator[bytes]:
        for size in sizes:
            yield b"x" * size

    async def rest(self, seconds: float) -> None:
        self.rests.append(seconds)


def test_a_stream_leaves_its_source_time_for_what_large_events_cost() -> None:
    sizes = [10, LARGE_BYTES // 2, LARGE_BYTES, 10 * LARGE_BYTES, 10]
    growing = Growing(sizes)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["more_body"] is False
        await EventStream(growing, PATIENCE_S)(scope, receive, send)

    with on_a_port(app, PATIENCE_S) as (_, url):
        answer = httpx.get(url)
    assert [len(one) for one in answer.content.split(b"\n\n")] == [len(b"data: ") + size for size in sizes] + [0]
    framing = len(b"data: \n\n")
    assert growing.rests == [(framing + size) / EVENT_BYTES_PER_S for size in sizes[2:4]]


def test_a_message_that_cannot_leave_is_given_up() -> None:
    async def stuck(message: Message) -> None:
        await asyncio.Event().wait()

    async def give_up() -> None:
        await in_time(stuck, 0.01)({"type": "http.response.body"})

    with pytest.raises(StoppedReading, match=r"0\.01 s"):
        asyncio.run(give_up())


def test_a_large_answer_of_an_operation_comes_in_pieces(server: Served) -> None:
    body = {
        "prompt": TEXT * 5,
        "model": MODEL,
        "source_set": SOURCE.partition("-")[2],
        "selected_sources": [],
        "sort_by_token_indexes": [],
        "ignore_bos": True,
        "num_results": 50,
    }
    sizes: list[int] = []
    for encoding in ("identity", "gzip"):
        with (
            server.client() as http,
            http.stream("POST", "/v1/activation/all", json=body, headers={"Accept-Encoding": encoding}) as answer,
        ):
            assert "content-length" not in answer.headers
            assert answer.headers.get("content-encoding", "identity") == encoding
            sizes.append(len(answer.read()))
            assert len(answer.json()["activations"]) == 50
    assert sizes[0] == sizes[1] > 2**14


def test_who_takes_nothing_does_not_hold_up_a_server_that_stops(caplog: pytest.LogCaptureFixture) -> None:
    """An answer that has begun has no place for the error either: it is cut off, without a traceback."""
    pieces, inside = Pieces(100_000), Inside()
    app = Boundary(EndsWithServer(sending(pieces).app, inside))
    server, listener = Server(app, 1000, inside, drain_s=0), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    url = url_of(listener)
    with caplog.at_level(logging.ERROR):
        thread.start()
        with connected(url) as client:
            client.recv(1)
            server.should_exit = True
            thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert pieces.closed.is_set()
    assert not any(record.exc_info for record in caplog.records)
