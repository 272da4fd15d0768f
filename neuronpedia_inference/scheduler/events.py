"""A ticket's events on the caller's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from neuronpedia_inference.scheduler.jobs import Ticket

_END = object()


class TicketEvents(AsyncIterator[Any]):
    """Every event of a ticket, or its result alone if it gives none; then its failure, if it failed.

    A class and not a generator, because closing a generator that was never started does not run its body: `aclose`
    always cancels the ticket, so the rows leave at the worker's next tick.
    """

    def __init__(self, submit: Callable[[Callable[[Any], None]], Ticket]) -> None:
        """`submit` begins the work, given where to put events; what it raises is raised here."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._ticket = submit(self._put)
        self._ticket.future.add_done_callback(self._finish)

    async def __anext__(self) -> Any:
        event = await self._events.get()
        if event is not _END:
            return event
        self._events.put_nowait(_END)  # for whoever asks again
        future = self._ticket.future
        if not future.cancelled() and future.exception() is not None:
            future.result()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop the work; no effect once it has ended."""
        self._ticket.cancel()

    def _finish(self, future: Future[Any]) -> None:
        if not self._ticket.wants_events and not future.cancelled() and future.exception() is None:
            self._put(future.result())
        self._put(_END)

    def _put(self, event: Any) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the caller's loop has closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
