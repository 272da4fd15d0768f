"""What a siege's hostile clients do: bodies, numbers, heads and sockets that no ordinary client sends.

Each attack says which operation the server has to count it for, and as what, or that it is none.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

from benchmarks.stalls_asks import SOURCE, completion, largest_steer, many_steers, nested_lists
from neuronpedia_inference.operations import by_name

HELD_S = (0.5, 3.0)
"""How long a socket is held for nothing."""
N_TINY, N_HALF_OPEN = 200_000, 5
OUTSIDE = "outside"
"""Refused before it was any operation's."""
Counted = tuple[str, str]
"""Operation and outcome, as a soak's tally has them."""


class Unexpected(Exception):
    """An answer that an attack should not get."""


@dataclass(frozen=True)
class Door:
    """A server, and how ordinary clients get in."""

    url: str
    headers: dict[str, str]

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        return url.host, url.port or 80

    def head(self, path: str, *more: str) -> bytes:
        """A request's head in HTTP/1.1, with what ordinary clients send."""
        host, port = self.address
        own = [f"{name}: {value}" for name, value in self.headers.items()]
        lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json", *own, *more]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


Attack = Callable[[Door, httpx.AsyncClient, random.Random], Awaitable[Counted]]


# Bodies


def _body(operation: str, make: Callable[[], bytes], *statuses: int, kind: str = "application/json") -> Attack:
    """A body that is refused with one of `statuses`, or with a 503 that was counted. It is made once."""
    made = cache(make)

    async def attack(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
        headers = {"Content-Type": kind}
        response = await http.post(by_name[operation].path, content=made(), headers=headers)
        return operation, _outcome(response, statuses)

    return attack


def _outcome(response: httpx.Response, statuses: tuple[int, ...]) -> str:
    """Raises Unexpected."""
    if response.status_code == 503 and response.json()["code"] == "overloaded":
        return "overloaded"
    if response.status_code not in statuses or not isinstance(response.json().get("error"), str):
        raise Unexpected(f"{response.status_code} {response.text[:200]}")
    return "refused"


def _steer(**fields: Any) -> Callable[[], bytes]:
    """A body of `steer` in JSON as Python writes it: with NaN and Infinity."""
    feature = {"source": SOURCE, "index": 1, "strength": 1}
    body = {"prompt": "I am I am I am", "features": [feature], "max_new_tokens": 4, "temperature": 1, **fields}
    return lambda: json.dumps(body).encode()


def _wire(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps({**json.loads(completion(4, 0, stream=False)), "temperature": 1, **fields}).encode()


def _nested(depth: int) -> bytes:
    return b'{"prompt": "a", "x": ' + b"[" * depth + b"]" * depth + b"}"


REFUSED = (400, 413, 422)
BODIES = (
    _body("tokenize", nested_lists, 413),
    _body("steer", many_steers, 413),
    _body("tokenize", lambda: _nested(15_000), *REFUSED),
    _body("steer", lambda: b'{"prompt": "' + b"a" * 2**21 + b'"}', *REFUSED),
    _body("steer", lambda: b"\xff\xfe{", *REFUSED),
    _body("steer", lambda: b'{"prompt": "\\ud800"}', *REFUSED),
    _body("top_k", lambda: b"[]", *REFUSED),
    _body("top_k", lambda: b"{}", *REFUSED, kind="text/plain"),
    _body("steer", _steer(temperature=float("nan")), *REFUSED),
    _body("steer", _steer(temperature=1e308), *REFUSED),
    _body("steer", _steer(features=[{"source": SOURCE, "index": 1, "strength": float("inf")}]), *REFUSED),
    _body("steer", _steer(features=[{"source": SOURCE, "index": 2**70, "strength": 1}]), *REFUSED),
    _body("steer", _steer(max_new_tokens=10**9), *REFUSED),
    _body("steer", _steer(seed=2**200), *REFUSED),
    _body("steer", _steer(vectors=[{"hook": "blocks.0.hook_nothing", "vector": [1.0] * 576, "strength": 1}]), *REFUSED),
    _body("steer", _steer(max_tokens=1), *REFUSED),
    _body("steer_completion", _wire(freq_penalty=-1e308), *REFUSED),
    _body("steer_completion", _wire(freq_penalty=1e308), *REFUSED),
    _body("steer_completion", _wire(types=["STEERED"] * 100_000), *REFUSED),
    _body("top_k", lambda: json.dumps({"prompt": "a b c", "source": SOURCE, "top_k": 10**7}).encode(), *REFUSED),
    _body("top_k", lambda: json.dumps({"prompt": "a", "source": "../../etc/passwd"}).encode(), *REFUSED),
    _body("activations", lambda: json.dumps({"prompt": "a", "num_results": 10**12}).encode(), *REFUSED),
    _body("activations", lambda: json.dumps({"prompt": "word " * 100_000}).encode(), *REFUSED),
)


_LARGEST = json.dumps(largest_steer()).encode()


async def largest(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
    """512 vectors: legal."""
    response = await http.post(by_name["steer"].path, content=_LARGEST, headers={"Content-Type": "application/json"})
    if response.status_code == 200:
        return "steer", "answered"
    return "steer", _outcome(response, ())


# Heads


async def heads(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
    """Wrong methods and paths, foreign hosts and pages, wrong keys: no operation's."""
    method, path, headers, statuses = rng.choice(
        [
            ("GET", "/v1/steer", {}, (405,)),
            ("POST", "/v1/" + "a" * 5000, {}, (404,)),
            ("DELETE", "/health", {}, (405,)),
            ("POST", "/initialize", {}, (409,)),
            ("POST", "/v1/steer", {"X-SECRET-KEY": "wrong"}, (401,)),
            ("POST", "/v1/steer", {"Origin": "https://example.org"}, (403,)),
            ("GET", "/v1/capabilities", {"Host": "example.org"}, (403,)),
            ("GET", "/health", {"X-Long": "a" * 100_000}, (431,)),
        ]
    )
    has_secret = bool(door.headers)
    if statuses == (401,) and not has_secret or statuses == (403,) and has_secret:
        path, statuses = "/v1/nothing", (404,)
        headers = {}
    try:
        response = await http.request(method, path, headers=headers)
    except httpx.RemoteProtocolError:
        if statuses != (431,):
            raise
        return OUTSIDE, "refused"  # the connection was closed while its head was sent
    return OUTSIDE, _outcome(response, statuses)


# Sockets


async def malformed(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
    """What is not HTTP, and a head that never ends."""
    reader, writer = await asyncio.open_connection(*door.address)
    writer.write(rng.choice([b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]))
    await _until(reader, rng)
    writer.transport.abort()
    return OUTSIDE, "refused"


async def half_open(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
    """Several connections that send half a head, or nothing, and stay."""
    writers = [(await asyncio.open_connection(*door.address))[1] for _ in range(N_HALF_OPEN)]
    for writer in writers:
        writer.write(rng.choice([b"", b"POST /v1/steer HT", b"POST /v1/steer HTTP/1.1\r\nHost: localhost\r\n"]))
    await asyncio.sleep(rng.uniform(*HELD_S))
    for writer in writers:
        writer.transport.abort()
    return OUTSIDE, "refused"


async def unfinished(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
    """A body that never comes whole."""
    _, writer = await asyncio.open_connection(*door.address)
    writer.write(door.head("/v1/tokenize", f"Content-Length: {2**21}") + b"[" + b" " * rng.randrange(2**20))
    await asyncio.sleep(rng.uniform(*HELD_S))
    writer.transport.abort()
    return "tokenize", "hung_up_before_an_answer"


async def tiny_chunks(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
    """A body in chunks of one byte; with a wrong key where there is one."""
    reader, writer = await asyncio.open_connection(*door.address)
    head = door.head("/v1/tokenize", "Transfer-Encoding: chunked")
    for value in door.headers.values():
        head = head.replace(value.encode(), b"wrong")
    writer.write(head)
    with suppress(ConnectionError):
        for _ in range(N_TINY // 1000):
            writer.write(b"1\r\n \r\n" * 1000)
            await writer.drain()
    await _until(reader, rng)
    writer.transport.abort()
    return (OUTSIDE, "refused") if door.headers else ("tokenize", "hung_up_before_an_answer")


async def never_read(door: Door, http: httpx.AsyncClient, rng: random.Random) -> Counted:
    """A long stream that nobody reads, and that is hung up on."""
    _, writer = await asyncio.open_connection(*door.address)
    transport: Any = writer.transport
    transport.pause_reading()
    body = completion(rng.randrange(20, 60), 10, stream=True)
    writer.write(door.head("/v1/steer/completion", f"Content-Length: {len(body)}") + body)
    await asyncio.sleep(rng.uniform(*HELD_S))
    transport.abort()
    return "steer_completion", "hung_up_before_an_answer"


async def _until(reader: asyncio.StreamReader, rng: random.Random) -> None:
    """The server closes, or a while has passed."""
    with suppress(TimeoutError, ConnectionError):
        await asyncio.wait_for(reader.read(), rng.uniform(*HELD_S))


OTHERS: tuple[Attack, ...] = (largest, heads, malformed, half_open, unfinished, tiny_chunks, never_read)


def draw(rng: random.Random) -> Attack:
    """As often a body as anything else."""
    return rng.choice(BODIES if rng.random() < 0.5 else OTHERS)
