"""An answer that is sent event by event, until its caller hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.operations import Events
from neuronpedia_inference.web.dialects import SSE, Dialect
from neuronpedia_inference.web.sending import in_time

LARGE_BYTES = 2**15
"""Smaller events follow each other without a pause."""
EVENT_BYTES_PER_S = 10e6
"""Of large events. More slows a fast model, whose thread waits for the interpreter while they are sent."""
T = TypeVar("T")


class ClientLeft(Exception):
    """The caller hung up; there is nobody to answer."""


class EventStream(Response):
    """Sends one event per item of `answers`, and closes it as soon as the caller hangs up."""

    def __init__(self, answers: Events[Any, bytes], send_timeout_s: float, dialect: Dialect = SSE) -> None:
        """send_timeout_s: how long a caller may take nothing before it is cut off."""
        # A proxy that buffers would hold events back.
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type=dialect.media_type
        )
        del self.headers["content-length"]
        if (
            dialect.media_type != SSE.media_type
        ):  # which is never compressed: an event would wait until there are enough for a block
            self.headers["content-encoding"] = "identity"
        self._dialect = dialect
        self._answers = answers
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Closed here and not by the task that sends: a task cancelled before its first step would close nothing.
        async with aclosing(self._answers):
            await while_connected(receive, self._send_events(in_time(send, self._send_timeout_s)))

    async def _send_events(self, send: Send) -> None:
        """Headers leave with the first event, so that a failure before it has its own status."""
        is_first = True
        async for answer in self._answers:
            body = self._dialect.event(answer)
            if is_first:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            is_first = False
            if len(body) >= LARGE_BYTES:
                await self._answers.rest(len(body) / EVENT_BYTES_PER_S)
            else:
                await asyncio.sleep(0)  # neither an event nor a send need wait, and then nobody else had a turn
        if is_first:
            raise EngineFailed("The stream ended without an event")
        await send({"type": "http.response.body", "body": self._dialect.end, "more_body": False})


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises ClientLeft when the caller hangs up first.

    The request's body must have been read: what arrives after it is the hang-up. Work that has ended all the same by
    the time it is cancelled has an answer that nobody takes: it is closed, because it holds its room.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(receive))
    is_taken = False
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        is_taken = working.done()
        if is_taken:
            return working.result()
        raise ClientLeft
    finally:
        await _stop(leaving)
        await _stop(working)
        if not is_taken:
            await _close_result(working)


async def _close_result(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is None and hasattr(task.result(), "aclose"):
        await task.result().aclose()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(task: asyncio.Future[Any]) -> None:
    """Cancel and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
