"""This project over HTTP: `neuronpedia-inference serve` on a port of its own, asked as any client would."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import AsyncExitStack
from typing import Any

import httpx

from benchmarks.child import timed
from benchmarks.process import Process
from benchmarks.wire import ROUTES, ask_all, read, requests_of, steer_body, texts_of

LOAD_S, ANSWER_S = 300.0, 600.0


class Served:
    """The client runs in this process; the server has one of its own."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._runner = asyncio.Runner()
        url = process.wait_for(re.compile(r"Listening on (http://\S+)"), LOAD_S).group(1)
        process.wait_for(re.compile(r"^Ready in "), LOAD_S)
        self._http = httpx.AsyncClient(base_url=url, timeout=ANSWER_S)

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        try:
            if line["kind"] == "FirstToken":
                return self._first_tokens(line)
            operation, bodies = requests_of(line)
            return timed(lambda: self._all(operation, bodies, line["at_a_time"]), line["times"])
        except (httpx.HTTPError, StreamEnded) as exc:
            return {"failed": f"{type(exc).__name__}: {exc}"}

    def close(self) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()
        self._process.close()

    def _all(self, operation: str, bodies: list[dict[str, Any]], at_a_time: int) -> list[Any]:
        return read(operation, self._runner.run(ask_all(self._ask, operation, bodies, at_a_time)))

    async def _ask(self, operation: str, body: dict[str, Any]) -> Any:
        response = await self._http.post(ROUTES[operation], json=body)
        response.raise_for_status()
        return response.json()

    def _first_tokens(self, line: dict[str, Any]) -> dict[str, Any]:
        spent, text = [], ""
        for _ in range(line["times"]):
            ms, text = self._runner.run(self._first_token(line))
            spent.append(ms)
        return {"ms": spent, "answer": text}

    async def _first_token(self, line: dict[str, Any]) -> tuple[float, str]:
        """Milliseconds to the first event, and its text. The others decode before, during and after."""
        async with AsyncExitStack() as stack:
            others = [Stream(self._http, steer_body(one, line["n_tokens"])) for one in line["others"]]
            for stream in others:
                await stack.enter_async_context(stream)
            await asyncio.gather(*(stream.first() for stream in others))
            started = time.perf_counter()
            measured = await stack.enter_async_context(Stream(self._http, steer_body(line["prompt"], line["n_tokens"])))
            text = await measured.first()
            spent = 1000 * (time.perf_counter() - started)
            for stream in others:
                stream.must_run()
        # The rows of those who hung up leave with the next step: wait until the server is idle again.
        await self._ask("steer_completion", steer_body(line["prompt"], 1))
        return spent, text


class StreamEnded(Exception):
    """A stream that should have decoded throughout came to its end."""


class Stream:
    """A streamed steer, read in the background; leaving it hangs up."""

    def __init__(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self._http, self._body = http, {**body, "stream": True}
        self._first: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Stream:
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.wait((self._reading,))

    async def first(self) -> str:
        """Text of the first event. Raises StreamEnded, or what the reading raised."""
        await asyncio.wait((self._first, self._reading), return_when=asyncio.FIRST_COMPLETED)
        if not self._first.done():
            await self._reading
            raise StreamEnded("no event came")
        return self._first.result()

    def must_run(self) -> None:
        """Raises StreamEnded."""
        if self._reading.done():
            raise StreamEnded("it ended before the measured stream began")

    async def _read(self) -> None:
        async with self._http.stream("POST", ROUTES["steer_completion"], json=self._body) as response:
            response.raise_for_status()
            async for text in response.aiter_lines():
                if text.startswith("data:") and not self._first.done():
                    self._first.set_result(texts_of(json.loads(text.removeprefix("data:")))[0])
