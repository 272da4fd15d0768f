"""A ticket's events on an event loop: folded while nobody reads, and never lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.scheduler.events import TicketEvents
from neuronpedia_inference.scheduler.jobs import Ticket


class Work:
    """A worker's side of one ticket."""

    def __init__(self) -> None:
        self.ticket = Ticket()

    def submit(self, put: Callable[[Sequence[Any]], None]) -> Ticket:
        self.ticket = Ticket(put)
        return self.ticket


def test_what_comes_while_the_reader_is_away_is_one_list() -> None:
    async def read() -> list[list[int]]:
        work, seen = Work(), []
        events = TicketEvents(work.submit, at_the_end=False)
        for n in range(1000):
            work.ticket.emit([n])
        seen.append(await anext(events))
        work.ticket.emit([1000])
        work.ticket.emit([1001])
        work.ticket.resolve(None)
        seen += [event async for event in events]
        assert [event async for event in events] == []  # whoever asks again
        return seen

    assert asyncio.run(read()) == [list(range(1000)), [1000, 1001]]


def test_a_reader_who_wants_the_end_is_not_woken_before() -> None:
    async def read() -> None:
        work = Work()
        events = TicketEvents(work.submit, at_the_end=True)
        reading = asyncio.ensure_future(anext(events))
        for n in range(3):
            work.ticket.emit([n])
            await asyncio.sleep(0)
        assert not reading.done()
        work.ticket.resolve(None)
        assert await reading == [0, 1, 2]

    asyncio.run(read())


def test_events_from_another_thread_come_in_order_and_before_the_failure() -> None:
    async def read() -> list[int]:
        work, seen = Work(), []
        events = TicketEvents(work.submit, at_the_end=False)

        def emit() -> None:
            for n in range(2000):
                work.ticket.emit([n])
            work.ticket.fail(EngineFailed("broken"))

        thread = threading.Thread(target=emit)
        thread.start()

        async def take_all() -> None:
            async for event in events:
                seen.extend(event)

        with pytest.raises(EngineFailed, match="broken"):
            await take_all()
        thread.join()
        return seen

    assert asyncio.run(read()) == list(range(2000))


def test_closing_cancels_and_a_cancelled_ticket_ends_the_events() -> None:
    async def read() -> list[Any]:
        work = Work()
        events = TicketEvents(work.submit, at_the_end=False)
        await events.aclose()
        assert work.ticket.cancelled
        work.ticket.emit([1])  # nobody is left to tell
        work.ticket.abandon()
        return [event async for event in events]

    assert asyncio.run(read()) == []


def test_a_rest_ends_with_the_work() -> None:
    async def read() -> list[int]:
        work = Work()
        events = TicketEvents(work.submit, at_the_end=False)
        work.ticket.emit([1])
        assert await anext(events) == [1]
        await events.rest(0.001)  # nothing has ended
        work.ticket.emit([2])
        resting = asyncio.ensure_future(events.rest(3600))
        await asyncio.sleep(0.01)
        assert not resting.done()
        threading.Thread(target=work.ticket.resolve, args=(None,)).start()
        await resting
        return await anext(events)

    assert asyncio.run(read()) == [2]
