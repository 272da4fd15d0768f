"""Parts 1 and 2: what strangers can do to a server before it knows who they are, and bodies."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from functools import cache
from http.client import HTTPConnection
from threading import Thread

import httpx

from benchmarks.fire_tree import MODEL, Served, Tree, limited, patience, rest_of, send, told

HEAD = b"POST /v1/tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ONE_BYTE_CHUNK = b"1\r\n \r\n"
MIB = 2**20
N_UPLOADED = 16 * MIB
HEAD_S = 40.0
"""By when every server has given up on half a head."""
N_CHUNKS = 5 * 2**20
"""Bytes of body, each a chunk of its own."""
N_FILES, N_HALF_OPEN, MOST_LOG = 128, 200, 2**16
N_UNFINISHED, UNFINISHED_BYTES, MOST_HELD_MIB, WATCHED_S = 60, 4 * 2**20, 176, 15.0
"""Bodies of a size that every tree takes."""
MOST_NESTED_S = 2.0


def a_401_ends_the_connection(tree: Tree) -> str:
    """A 401 closes the connection, and 5 MB that still come in one-byte chunks do not hold the loop.

    (232fc0c leaves it open; that these chunks hold its loop for long was not seen again here.)
    """
    served = tree.locked
    with served.connected() as connection:
        before = served.processor_s()
        flood = Thread(target=send, args=(connection, CHUNKED + ONE_BYTE_CHUNK * N_CHUNKS), daemon=True)
        flood.start()
        health_ms = [_health_ms(served) for _ in range(20)]
        flood.join()
        health_ms.append(_health_ms(served))
        spent = served.processor_s() - before
        head = connection.recv(2**16)
    assert head.startswith(b"HTTP/1.1 401"), head[:40]
    shown = f"5 MB behind it took {spent:.1f} s of the processor, /health {max(health_ms):.0f} ms at worst"
    assert b"connection: close" in head.lower(), f"the connection stays open; {shown}"
    return f"closed; {shown}"


def _health_ms(served: Served) -> float:
    started = time.perf_counter()
    served.http.get("/health")
    return 1000 * (time.perf_counter() - started)


def who_uploads_reads_the_401(tree: Tree) -> str:
    """Close after 401, drained so that ordinary clients read the answer."""
    return _uploads(tree.locked, 401)


def who_uploads_reads_the_413(tree: Tree) -> str:
    """Close after 413, drained so that ordinary clients read the answer."""
    return _uploads(tree.open, 413)


def _uploads(served: Served, status: int) -> str:
    """By a client that sends all before it reads, as the standard library's does."""
    url = httpx.URL(served.url)
    for number in range(3):
        client = HTTPConnection(url.host, url.port, timeout=60)
        try:
            client.request("POST", "/v1/tokenize", b" " * N_UPLOADED, {"Content-Type": "application/json"})
            answer = client.getresponse()
        except OSError as exc:
            raise AssertionError(f"client {number + 1} of 3 reads no answer: {type(exc).__name__}") from None
        finally:
            client.close()
        assert answer.status == status, answer.status
        assert answer.getheader("connection") == "close", "the connection stays open"
    return f"3 clients sent {N_UPLOADED // MIB} MiB, read the {status}, and were closed"


@cache
def _beset(tree: Tree) -> tuple[str, int]:
    """Of a server that may open 128 files, beside 200 sockets with half a head: its `/health`, and bytes of log."""
    few = limited("-n", N_FILES)
    with tree.serving(*tree.small_words, before=few, env={"LOG_LEVEL": "info"}) as served, ExitStack() as left:
        quiet = len(served.err)
        for _ in range(N_HALF_OPEN):
            send(left.enter_context(served.connected()), b"GET /health HTTP/1.1\r\nHost: 127")
        try:
            answer = told(httpx.get(f"{served.url}/health", timeout=20 * patience()))
        except httpx.HTTPError as exc:
            answer = type(exc).__name__
        return answer, len(served.err) - quiet


def half_open_sockets_leave_files(tree: Tree) -> str:
    """A bound on connections below the descriptor limit: 200 half-open sockets at `ulimit -n 128` hold nobody up."""
    answer, _ = _beset(tree)
    assert answer.startswith("200"), f"/health of another: {answer} after 20 s at most"
    return f"/health of another: {answer}"


def half_open_sockets_are_no_news(tree: Tree) -> str:
    """Quiet logs: the same 200 sockets are no news."""
    _, n_bytes = _beset(tree)
    assert n_bytes <= MOST_LOG, f"{n_bytes / MIB:.1f} MiB of log"
    return f"{n_bytes} bytes of log"


def a_head_that_stops_is_given_up(tree: Tree) -> str:
    """Header and idle timeouts: who says nothing, or half a head, on a new connection or a used one, is closed."""
    used = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with ExitStack() as left:
        silent, half, again = (left.enter_context(tree.open.connected()) for _ in range(3))
        send(half, HEAD)
        send(again, used)
        assert again.recv(2**16).startswith(b"HTTP/1.1 200")
        send(again, HEAD)
        started = time.monotonic()
        for name, one in (("silent", silent), ("half a head", half), ("half a head behind an answer", again)):
            assert rest_of(one, max(1.0, HEAD_S * patience() - (time.monotonic() - started))) is not None, (
                f"{name}: open after {HEAD_S:.0f} s"
            )
    return f"all closed after {time.monotonic() - started:.0f} s"


def a_body_that_stops_is_given_up(tree: Tree) -> str:
    """A body timeout: one that stops coming is answered with a 408."""
    with tree.serving(*tree.small_words, env={"RECEIVE_TIMEOUT": "1"}) as served, served.connected() as connection:
        send(connection, HEAD + b"Content-Length: 40\r\n\r\n{")
        answer = rest_of(connection, 20 * patience())
    assert answer is not None, "open after 20 s"
    assert answer.startswith(b"HTTP/1.1 408"), answer[:40]
    return "408 after the second that RECEIVE_TIMEOUT gave it"


def unfinished_bodies_are_admitted(tree: Tree) -> str:
    """Bytes of bodies are admitted like work: 60 unfinished bodies do not lie in memory."""
    part = HEAD + b"Content-Length: %d\r\n\r\n" % UNFINISHED_BYTES + b" " * (UNFINISHED_BYTES - 1)
    with tree.serving(*tree.small_words) as served, ExitStack() as left:
        before = served.about.memory_info().rss
        for _ in range(N_UNFINISHED):
            connection = left.enter_context(served.connected())
            Thread(target=send, args=(connection, part), daemon=True).start()
        started, most = time.monotonic(), 0
        while most <= MOST_HELD_MIB * MIB and time.monotonic() - started < WATCHED_S:
            time.sleep(0.1)
            most = max(most, served.about.memory_info().rss - before)
        _health_ms(served)
    assert most <= MOST_HELD_MIB * MIB, f"{most / MIB:.0f} MiB more, and growing"
    return f"{most / MIB:.0f} MiB more"


# Bodies


def a_body_of_6_mb_is_too_large(tree: Tree) -> str:
    """A smaller default for MAX_BODY_BYTES than 8 MB."""
    body = json.dumps({"model": MODEL, "text": "Hi", "x": "y" * 6 * MIB})
    answer = tree.open.http.post("/v1/tokenize", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413, f"6 MiB: {told(answer)}"
    return told(answer)


def unknown_fields_cost_little(tree: Tree) -> str:
    """Unknown fields of Neuronpedia's routes are skipped cheaply: `{"x":[[],[],...]}` of 8 MB."""
    body = b'{"x":[' + b"[]," * (8 * MIB // 3) + b"[]]}"
    with tree.serving(*tree.small_words, env={"MAX_BODY_BYTES": str(9 * MIB)}) as served:
        before = served.processor_s()
        answer = served.http.post("/v1/tokenize", content=body, headers={"Content-Type": "application/json"})
        spent = served.processor_s() - before
    shown = f"{answer.status_code} after {spent:.2f} s of the processor"
    assert spent <= MOST_NESTED_S, shown
    assert answer.status_code in (400, 413, 422), shown
    return shown


PROBES = {
    1: (
        a_401_ends_the_connection,
        who_uploads_reads_the_401,
        who_uploads_reads_the_413,
        half_open_sockets_leave_files,
        half_open_sockets_are_no_news,
        a_head_that_stops_is_given_up,
        a_body_that_stops_is_given_up,
        unfinished_bodies_are_admitted,
    ),
    2: (a_body_of_6_mb_is_too_large, unknown_fields_cost_little),
}
