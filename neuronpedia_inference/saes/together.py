"""Several sources at once, kept for long: who needs them takes all in turn, so that no two wait for each other.

Who decodes keeps its sources until its text has ended, and asks for no others; so does who waits for its turn to
decode. Of those who still gather, one alone may hold some while it waits for the rest: all that it waits for ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

from neuronpedia_inference.domain import Source
from neuronpedia_inference.saes.encode import FeatureReader

Gathering = Generator[Future[Any], Any, dict[Source, FeatureReader]]


class Together:
    """Used by one thread."""

    def __init__(self, request: Callable[[Source], Future[Any]]) -> None:
        """`request` as `Shelf.request`: the future of a lease."""
        self._request = request
        self._turn = _Turn()

    def take(self, sources: Sequence[Source], held: ExitStack) -> Gathering:
        """Yields futures, and is sent what they give; the leases go to `held`. The sources must have room together."""
        readers: dict[Source, FeatureReader] = {}
        if not sources:
            return readers
        with (yield self._turn.request()):
            for source in sources:
                readers[source] = held.enter_context((yield self._request(source)))
        return readers


class _Turn:
    """One at a time, in order of asking. What a future gives is the turn, which has to be given back."""

    def __init__(self) -> None:
        self._waiting: deque[Future[_Turn]] = deque()
        self._is_taken = False

    def request(self) -> Future[_Turn]:
        future: Future[_Turn] = Future()
        if self._is_taken:
            self._waiting.append(future)
        else:
            self._is_taken = True
            future.set_result(self)
        return future

    def release(self) -> None:
        self._is_taken = False
        while self._waiting and not self._is_taken:
            future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                self._is_taken = True
                future.set_result(self)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.release()
