"""Long work on an event loop, in slices: after 5 ms everybody else has a turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterable
from typing import TypeVar

SLICE_S = 0.005
"""Seconds of work after which others have a turn."""

T = TypeVar("T")


class Pace:
    """Asked between small steps of long work; gives way when the slice is used up."""

    def __init__(self) -> None:
        self._until_s = time.perf_counter() + SLICE_S

    async def give_way(self) -> None:
        """Let others run if this slice has lasted long enough."""
        if time.perf_counter() >= self._until_s:
            await asyncio.sleep(0)
            self._until_s = time.perf_counter() + SLICE_S


async def paced(steps: Generator[None, None, T]) -> T:
    """What the generator returns. Between its yields others have their turns."""
    pace = Pace()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        await pace.give_way()


async def paced_pieces(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Those that are not empty. Between two of them, empty or not, others have their turns."""
    pace = Pace()
    for piece in pieces:
        if piece:
            yield piece
        await pace.give_way()
