"""Sending to callers who may not read.

An answer waits here, with all it holds, as long as its caller takes nothing of it, and is cut off after SEND_TIMEOUT.
The kernel then drops the connection with what is still buffered for it: see `web.serve.listen`.
"""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Send


class StoppedReading(ClientDisconnect):
    """The caller is connected but takes nothing of its answer."""


def in_time(send: Send, timeout_s: float) -> Send:
    """`send`, which raises StoppedReading when one message cannot leave for so long."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await send(message)
        except TimeoutError:
            raise StoppedReading(f"Nothing of the answer was read for {timeout_s:g} s") from None

    return send_in_time
