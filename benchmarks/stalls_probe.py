"""Asks a server for `/health` fifty times a second, and its memory with it, from a process that does nothing else.

`python -m benchmarks.stalls_probe URL PID`: for every line on standard input, one line of JSON with what was seen since
the last. A poll begins when it is due and not when the last one has been answered: a stall of a second is fifty polls
that were late, not one. Each has a kept-alive connection to itself, and its time runs from its sending to its answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

import psutil

EVERY_S = 0.02
CHILDREN_EVERY = 50
"""Polls between two looks for child processes."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Probe:
    def __init__(self, url: str, pid: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._process = psutil.Process(pid)
        self._family = [self._process]
        self._idle: list[Connection] = []
        self._polls: set[asyncio.Task[None]] = set()
        self.milliseconds: list[float] = []
        self.resident_mib: list[float] = []

    async def run(self) -> None:
        """Until cancelled."""
        due_s, number = time.perf_counter(), 0
        while True:
            poll = asyncio.create_task(self._poll())
            self._polls.add(poll)
            poll.add_done_callback(self._polls.discard)
            self._look(number)
            number, due_s = number + 1, due_s + EVERY_S
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))

    async def taken(self) -> str:
        """What was seen since the last time, once all polls that were sent are answered."""
        if sent := set(self._polls):
            await asyncio.wait(sent)
        seen = {"ms": self.milliseconds, "mib": self.resident_mib}
        self.milliseconds, self.resident_mib = [], []
        return json.dumps(seen)

    async def _poll(self) -> None:
        """Raises OSError or EOFError when the server is gone."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        sent_s = time.perf_counter()
        writer.write(f"GET /health HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        await reader.readuntil(b"}")
        self.milliseconds.append(1000 * (time.perf_counter() - sent_s))
        self._idle.append((reader, writer))

    def _look(self, number: int) -> None:
        """Resident memory of the server and of its children."""
        if number % CHILDREN_EVERY == 0:
            self._family = [self._process, *self._process.children(recursive=True)]
        resident = 0
        for process in self._family:
            with suppress(psutil.NoSuchProcess):
                resident += process.memory_info().rss
        self.resident_mib.append(resident / 2**20)


async def main(url: str, pid: int) -> None:
    probe, loop = Probe(url, pid), asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line)

    threading.Thread(target=listen, daemon=True).start()
    running = asyncio.create_task(probe.run())
    while True:
        await lines.get()
        assert not running.done(), running.exception()
        print(await probe.taken(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
