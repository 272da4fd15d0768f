"""An answer that comes as its caller hangs up is closed, because it holds its room until then."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from starlette.types import Message

from neuronpedia_inference.web.sse import ClientLeft, while_connected


class Answer:
    """What has been answered, and holds its room."""

    is_closed = False

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_an_answer_that_comes_although_it_was_stopped_is_closed(is_cancelled: bool) -> None:
    """So are the callers whose own task is stopped, as when the server ends."""
    answer = Answer()

    async def work() -> Answer:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return answer

    async def asked() -> None:
        stays = asyncio.Event()

        async def receive() -> Message:
            if is_cancelled:
                await stays.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(while_connected(receive, work()))
        for _ in range(5):
            await asyncio.sleep(0)
        if is_cancelled:
            task.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else ClientLeft):
            await task

    asyncio.run(asked())
    assert answer.is_closed
