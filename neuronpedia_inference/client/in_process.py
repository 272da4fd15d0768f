"""The service in this process: no port, no copy of the weights but one."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from neuronpedia_inference.client.transports import Answer, Body
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.exits import HALT_S
from neuronpedia_inference.operations import answer, answer_events, answer_pieces, by_name
from neuronpedia_inference.settings import Settings

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

T = TypeVar("T")


def start(settings: Settings, say: Callable[[str], None] = lambda _: None) -> Runtime:
    """A loaded service. Blocks; raises StartupError."""
    from neuronpedia_inference.garbage import uncollected
    from neuronpedia_inference.runtime import Runtime

    with uncollected():
        return Runtime.load(settings, say)


class InProcess:
    """For threads: a loop of its own, so that it works where one runs already, as in a notebook."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def __repr__(self) -> str:
        return f"InProcess({self._runtime.model.id!r})"

    def ask(self, operation: str, body: Body) -> Answer:
        return self._run(answer(by_name[operation], body, self._runtime))

    def ask_tensors(self, operation: str, body: Body) -> bytes:
        return self._run(_tensors(operation, body, self._runtime))

    def stream(self, operation: str, body: Body) -> Iterator[Answer]:
        events = self._run(answer_events(by_name[operation], body, self._runtime))
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            self._run(events.aclose())

    def capabilities(self) -> Answer:
        return self._runtime.describe()

    def close(self) -> None:
        if self._thread.is_alive():
            atexit.unregister(self._stop)
            self._stop(None)
            self._loop.close()
            self._runtime.close()

    def _stop(self, wait_s: float | None = HALT_S) -> None:
        """Also where the process ends: no thread runs on beside an interpreter that ends."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(wait_s)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise InvalidRequest("this client is closed; load() makes another")
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # where the caller was interrupted: what nobody waits for ends


async def _tensors(operation: str, body: Body, runtime: Runtime) -> bytes:
    async with aclosing(await answer_pieces(by_name[operation], body, runtime, accepts_tensors=True)) as pieces:
        return b"".join([piece async for piece in pieces])


async def _next(events: AsyncIterator[Answer]) -> Answer | None:
    async for event in events:
        return event
    return None


class AsyncInProcess:
    """For coroutines, on whatever loop they run."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def __repr__(self) -> str:
        return f"AsyncInProcess({self._runtime.model.id!r})"

    async def ask(self, operation: str, body: Body) -> Answer:
        return await answer(by_name[operation], body, self._runtime)

    async def ask_tensors(self, operation: str, body: Body) -> bytes:
        return await _tensors(operation, body, self._runtime)

    async def stream(self, operation: str, body: Body) -> AsyncIterator[Answer]:
        events = await answer_events(by_name[operation], body, self._runtime)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def capabilities(self) -> Answer:
        return self._runtime.describe()

    async def close(self) -> None:
        await asyncio.to_thread(self._runtime.close)
