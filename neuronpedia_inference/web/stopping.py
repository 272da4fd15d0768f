"""Who is inside when a server ends: they get time, then an error that says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from neuronpedia_inference.errors import NotReady


class Inside:
    """The requests that are being answered."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_over = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The request of the running task. Raises NotReady once the time of those inside is over."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            task.uncancel()
            raise NotReady("The server stopped before this answer was complete. Try again soon.") from None
        finally:
            self._tasks.discard(task)

    def end(self) -> int:
        """End them all; how many there were."""
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        return len(self._tasks)


class EndsWithServer:
    """Below the boundary, which makes an answer or an event of the error."""

    def __init__(self, app: ASGIApp, inside: Inside) -> None:
        self.app = app
        self._inside = inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._inside.entered():
            await self.app(scope, receive, send)
