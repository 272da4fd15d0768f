"""A ticket's events on the caller's event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from neuronpedia_inference.scheduler.jobs import Ticket


class TicketEvents(AsyncIterator[list[Any]]):
    """What has come since the last time, folded into one list however long the reader was away; then the failure.

    A class and not a generator, because closing a generator that was never started does not run its body: `aclose`
    always cancels the ticket, so the rows leave at the worker's next tick.
    """

    def __init__(self, submit: Callable[[Callable[[Sequence[Any]], None]], Ticket], *, at_the_end: bool) -> None:
        """`submit` begins the work, given where to put events; what it raises is raised here.

        at_the_end: everything in one list once the ticket has ended, without waking the reader before.
        """
        self._loop = asyncio.get_running_loop()
        self._wakes = not at_the_end
        self._lock = threading.Lock()
        self._folded: list[Any] = []
        self._has_news = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._ticket = submit(self._put)
        self._ticket.future.add_done_callback(lambda _: self._tell(self._end))

    async def __anext__(self) -> list[Any]:
        future = self._ticket.future
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            has_ended = future.done()  # before the events are taken: afterwards there may be more
            events = self._take()
            if has_ended:
                self._has_news.set()  # for whoever asks again
            if events:
                return events
            if has_ended:
                _raise_failure(future)
                raise StopAsyncIteration

    async def rest(self, seconds: float) -> None:
        """Leave the work alone for so long, or until it has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_ended.wait()

    async def aclose(self) -> None:
        """Stop the work; no effect once it has ended."""
        self._ticket.cancel()

    def _take(self) -> list[Any]:
        with self._lock:
            events, self._folded = self._folded, []
        return events

    def _put(self, events: Sequence[Any]) -> None:
        """From the worker's thread."""
        with self._lock:
            is_first = not self._folded
            self._folded.extend(events)
        if is_first and self._wakes:
            self._tell(self._has_news.set)

    def _end(self) -> None:
        self._has_ended.set()
        self._has_news.set()

    def _tell(self, news: Callable[[], None]) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the caller's loop has closed: nobody is left to tell
            self._loop.call_soon_threadsafe(news)


def _raise_failure(future: Future[Any]) -> None:
    if not future.cancelled() and future.exception() is not None:
        future.result()
