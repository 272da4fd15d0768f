"""What the benchmark of stalls does to a server: starts it, watches it, asks it, reads its answers or does not."""

from __future__ import annotations

import asyncio
import json
import math
import re
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from benchmarks.process import Process
from benchmarks.soak import LOAD_S, QUIET

ANSWER_S, QUIET_S, SETTLE_S = 1800.0, 600.0, 1.0
ADMITTED = re.compile(r"^neuronpedia_admitted_bytes_peak(?:\{\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Seen:
    """What the probe saw in a while."""

    ms: list[float]
    mib: list[float]

    def health(self) -> dict[str, float | int]:
        """Milliseconds of `/health`."""
        return {
            "polls": len(self.ms),
            "p50_ms": round(quantile(self.ms, 0.5), 1),
            "p99_ms": round(quantile(self.ms, 0.99), 1),
            "worst_ms": round(max(self.ms), 1),
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Frames:
    """Server-sent events by the moment at which their last byte came, and their bytes."""

    def __init__(self) -> None:
        self.arrived_s: list[float] = []
        self.sizes: list[int] = []
        self._open, self._ends_in_newline = 0, False

    def feed(self, chunk: bytes, now_s: float) -> None:
        if not chunk:
            return
        start = 0
        if self._ends_in_newline and chunk.startswith(b"\n"):
            start = self._end(0, 1, now_s)
        while (at := chunk.find(b"\n\n", start)) >= 0:
            start = self._end(start, at + 2, now_s)
        self._open += len(chunk) - start
        self._ends_in_newline = self._open > 0 and chunk.endswith(b"\n")

    def _end(self, start: int, end: int, now_s: float) -> int:
        self.arrived_s.append(now_s)
        self.sizes.append(self._open + end - start)
        self._open = 0
        return end

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.arrived_s, self.arrived_s[1:], strict=False)]


@dataclass(frozen=True)
class Answer:
    status: int
    n_bytes: int
    """As they were sent, so compressed where the server compresses."""
    seconds: float
    frames: Frames
    head: bytes
    """The first bytes, to say what was refused."""


class Server:
    """A server in a process of its own, and the probe in another."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        env = {"LOG_LEVEL": "error", **settings}
        self._process = Process("neuronpedia_inference", "serve", "--port", "0", env=env)
        self.url = self._process.wait_for(re.compile(r"Listening on (http://\S+)"), LOAD_S).group(1)
        self._process.wait_for(re.compile(r"^Ready in "), LOAD_S)
        (process,) = psutil.Process().children()
        self._probe = Process("benchmarks.stalls_probe", self.url, str(process.pid))
        self.http = httpx.AsyncClient(base_url=self.url, timeout=ANSWER_S)

    def seen(self) -> Seen:
        """Since the last time. Blocks until what was sent is answered."""
        self._probe.send("take")
        return Seen(**json.loads(self._probe.line(ANSWER_S)))

    async def quiet_mib(self) -> float:
        """Resident memory, in the median of a second in which nothing is going on."""
        await self.at_rest()
        await asyncio.sleep(SETTLE_S)
        self.seen()
        await asyncio.sleep(SETTLE_S)
        return statistics.median(self.seen().mib)

    async def at_rest(self) -> None:
        """Returns once nothing waits or runs any more."""
        until_s = time.monotonic() + QUIET_S
        while self._is_busy((await self.http.get("/metrics")).text):
            assert time.monotonic() < until_s, "the server does not come to rest"
            await asyncio.sleep(0.1)

    async def admitted_mib(self) -> float | None:
        """The most that was admitted at a time; None where the server does not say."""
        found = ADMITTED.search((await self.http.get("/metrics")).text)
        return float(found.group(1)) / 2**20 if found else None

    async def ask(self, path: str, body: bytes) -> Answer:
        """Read as fast as it comes, looking only for the ends of events."""
        frames, n_bytes, head, started_s = Frames(), 0, b"", time.perf_counter()
        headers = {"Content-Type": "application/json"}
        async with self.http.stream("POST" if body else "GET", path, content=body or None, headers=headers) as response:
            async for chunk in response.aiter_raw():
                frames.feed(chunk, time.perf_counter())
                n_bytes += len(chunk)
                head = head or chunk[:300]
        return Answer(response.status_code, n_bytes, time.perf_counter() - started_s, frames, head)

    @asynccontextmanager
    async def unread(self, path: str, body: bytes) -> AsyncIterator[None]:
        """A client that asks, reads nothing, and hangs up when it is left."""
        url = httpx.URL(self.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        transport: Any = writer.transport
        transport.pause_reading()
        head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        try:
            yield
        finally:
            transport.abort()

    async def close(self) -> None:
        await self.http.aclose()
        self._probe.close()
        self._process.close()

    def _is_busy(self, metrics: str) -> bool:
        counts = re.findall(rf"^neuronpedia_(?:{'|'.join(QUIET)}) (\S+)$", metrics, re.MULTILINE)
        return any(float(count) for count in counts)


@asynccontextmanager
async def serving(**settings: str) -> AsyncIterator[Server]:
    server = Server(settings)
    try:
        yield server
    finally:
        await server.close()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table whose columns are the keys of the first row; None is shown as a dash."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row.get(key)) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,.10g}" if isinstance(value, int | float) else str(value)
