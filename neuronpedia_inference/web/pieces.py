"""An answer as it is rendered: whole if it is small, else piece by piece, no faster than its caller reads."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from neuronpedia_inference.operations import Events
from neuronpedia_inference.tensor_files import MEDIA_TYPE
from neuronpedia_inference.web.sending import in_time
from neuronpedia_inference.web.sse import while_connected


class PiecedAnswer(Response):
    """The pieces of one JSON text, or of a file of tensors.

    They are closed as soon as the caller hangs up or stops reading.
    """

    def __init__(self, pieces: Events[Any, bytes], send_timeout_s: float) -> None:
        super().__init__(media_type=pieces.media_type)
        if pieces.media_type == MEDIA_TYPE:  # numbers gain little by compression, and it would take most of the time
            self.headers["content-encoding"] = "identity"
        self._pieces = pieces
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            await while_connected(receive, self._send_pieces(in_time(send, self._send_timeout_s)))

    async def _send_pieces(self, send: Send) -> None:
        """Headers leave when the first two pieces are there: a failure before has its own status."""
        first = await anext(self._pieces)
        following = await anext(self._pieces, None)
        n_bytes = len(first) if following is None else self._pieces.n_bytes
        if n_bytes is not None:
            self.headers["content-length"] = str(n_bytes)
        else:
            del self.headers["content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while following is not None:
            await send({"type": "http.response.body", "body": first, "more_body": True})
            await asyncio.sleep(0)  # a send need not wait, and a hang-up is noticed only where one waits
            first, following = following, await anext(self._pieces, None)
        await send({"type": "http.response.body", "body": first, "more_body": False})
