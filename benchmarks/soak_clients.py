"""The clients of the soak: they ask without a pause, and a quarter of their requests hang up at a random moment."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak_mix import Ask, draw
from neuronpedia_inference.operations import by_name

ANSWER_S = 300.0
HANG_UP_SHARE, RETRY_AFTER_S = 0.25, 1.0
SEEN = ("answered", "refused", "overloaded")
HUNG_UP = ("hung_up_before_an_answer", "hung_up_within_it")

Counts = Counter[tuple[str, str]]
"""By operation and outcome."""


class Unexpected(Exception):
    """An answer that no request of the mix should get."""


@dataclass
class Tally:
    """What the clients saw."""

    counts: Counts = field(default_factory=Counter)
    waited_s: dict[str, float] = field(default_factory=dict)
    """From sending to the begin of the answer, by operation, the latest time."""
    answered_s: dict[str, float] = field(default_factory=dict)
    """From there to its end."""
    faults: list[str] = field(default_factory=list)

    @property
    def hung_up(self) -> int:
        return sum(n for (_, outcome), n in self.counts.items() if outcome in HUNG_UP)


@dataclass(frozen=True)
class Leave:
    """When to hang up: so long after the request was sent, or after its answer began."""

    patience_s: float
    within_answer: bool = False


async def crowd(url: str, n_clients: int, seconds: float, seed: int) -> Tally:
    """`n_clients` ask until the time is over, and then wait for what they have begun."""
    tally, until_s = Tally(), time.monotonic() + seconds
    # One pool for all: requests at the same time have connections of their own, and to make 32 pools takes a second.
    pool = httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=httpx.Limits())
    async with pool as http, asyncio.TaskGroup() as group:
        for number in range(n_clients):
            group.create_task(client(http, random.Random(f"{seed}/{number}"), until_s, tally))
    return tally


async def client(http: httpx.AsyncClient, rng: random.Random, until_s: float, tally: Tally) -> None:
    while time.monotonic() < until_s:
        exchange = Exchange(draw(rng))
        outcome = await outcome_of(exchange, http, leave_of(exchange.ask, rng, tally), tally)
        tally.counts[exchange.ask.operation, outcome] += 1
        if outcome == "overloaded":
            await asyncio.sleep(RETRY_AFTER_S)


def leave_of(ask: Ask, rng: random.Random, tally: Tally) -> Leave | None:
    """A random moment of the request's life, going by the latest of its kind; None to stay.

    Who meant to hang up and was too late is made up for by another.
    """
    if tally.hung_up >= HANG_UP_SHARE * tally.counts.total() or rng.random() < 0.25:
        return None
    if ask.body.get("stream") and rng.random() < 0.5:
        return Leave(rng.random() * tally.answered_s.get(ask.operation, 0.5), within_answer=True)
    return Leave(rng.random() * tally.waited_s.get(ask.operation, 1.0))


async def outcome_of(exchange: Exchange, http: httpx.AsyncClient, leave: Leave | None, tally: Tally) -> str:
    """One of SEEN or HUNG_UP, or "failed", with its story in the tally."""
    operation = exchange.ask.operation
    try:
        outcome = await exchange.outcome(http, leave)
    except (httpx.HTTPError, Unexpected) as exc:
        tally.faults.append(f"{operation}: {type(exc).__name__} {exc}")
        return "failed"
    if outcome == "answered":
        tally.waited_s[operation] = exchange.begun.at_s - exchange.sent.at_s
        tally.answered_s[operation] = time.monotonic() - exchange.begun.at_s
    return outcome


class Moment:
    """Something that happens once, and when."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self.reached = asyncio.Event()

    def now(self) -> None:
        self.at_s = time.monotonic()
        self.reached.set()


class Exchange:
    """One request and its answer."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.sent = Moment()
        self.begun = Moment()
        """The answer's headers are there: of a stream, those come with its first event."""

    async def outcome(self, http: httpx.AsyncClient, leave: Leave | None) -> str:
        """One of SEEN or HUNG_UP. Raises Unexpected or httpx.HTTPError."""
        asking = asyncio.create_task(self._answer(http))
        if leave is not None:
            awaited = (self.begun if leave.within_answer else self.sent).reached.wait()
            await _first_of(asking, awaited)
            await asyncio.wait((asking,), timeout=leave.patience_s)
            asking.cancel()
        await asyncio.wait((asking,))
        return HUNG_UP[self.begun.reached.is_set()] if asking.cancelled() else asking.result()

    async def _answer(self, http: httpx.AsyncClient) -> str:
        path, extensions = by_name[self.ask.operation].path, {"trace": self._trace}
        async with http.stream("POST", path, json=self.ask.body, extensions=extensions) as response:
            lines = [line async for line in response.aiter_lines() if line]
        return understood(self.ask, response, lines)

    async def _trace(self, event: str, _: Any) -> None:
        if event == "http11.send_request_body.complete":
            self.sent.now()
        elif event == "http11.receive_response_headers.complete":
            self.begun.now()


async def _first_of(task: asyncio.Task[Any], other: Coroutine[Any, Any, Any]) -> None:
    waiting = asyncio.ensure_future(other)
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def understood(ask: Ask, response: httpx.Response, lines: list[str]) -> str:
    """One of SEEN. Raises Unexpected for anything else, and for an outcome that does not fit the request."""
    status = response.status_code
    if status == 503:
        if json.loads(lines[0])["code"] == "overloaded":
            return "overloaded"
    elif ask.is_good and status == 200:
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        if lines and is_stream == bool(ask.body.get("stream")) and "event: error" not in lines:
            return "answered"
    elif not ask.is_good and status in (400, 422):
        return "refused"
    raise Unexpected(f"{status} {' '.join(lines)[:300]}")
