"""Connections that nobody holds for nothing: what uvicorn has no setting for.

A request's head has to come within HEAD_S and its framing (head, chunk sizes, trailers) within MAX_FRAMING. A
connection is read a little at a time, so that others have their turns. There are at most so many, and for a new one the
one that has waited longest for its caller goes. Where an answer leaves before its request has come in whole, what is
still coming is thrown away unparsed for a while, because most callers read only when they have sent everything.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from neuronpedia_inference.errors import HeadTooLarge, InferenceError, MalformedHttp, Overloaded
from neuronpedia_inference.web.answers import plain_http

AT_ONCE_BYTES = 2**14
"""Read from one connection before others have their turn: some milliseconds, were it all chunks of one byte."""
HEAD_S = 20.0
"""From a connection's first moment, or a request's first byte, to the end of the request's head."""
MAX_FRAMING = 2**16
"""Bytes of a request that are not its body; as many more as the body has, which is chunks of five bytes."""
LINGER_S, LINGER_BYTES = 5.0, 2**26
"""How much of a request is still taken in, and thrown away, once its answer has left."""
RELEASED = frozenset({"close", "abort"})


class Lobby:
    """All connections of a server, and which of them wait for their callers, those that came first ahead."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._n_open = 0
        self._waiting: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> bool:
        """False where all others are at work, so that there is no place for it."""
        self._n_open += 1
        has_room = self._n_open <= self._most or self._evict()
        self.wait(connection)
        return has_room

    def leave(self, connection: Connection) -> None:
        self._n_open -= 1
        self.work(connection)

    def wait(self, connection: Connection) -> None:
        self._waiting[connection] = None

    def work(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)

    def _evict(self) -> bool:
        longest = next(iter(self._waiting), None)
        if longest is None:
            return False
        self.work(longest)  # its place is free only once its socket is closed, which takes a turn of the loop
        longest.abort()
        return True


class Connection(HttpToolsProtocol, asyncio.BufferedProtocol):
    """One connection, read with httptools."""

    def __init__(self, lobby: Lobby, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._lobby = lobby
        self._buffer = bytearray()
        self._n_framing = self._n_body = self._n_discarded = 0
        self._n_of_head = 0
        """Bytes at hand that the next head begins with; those of one that was sent behind another are not known."""
        self._is_amid_message = self._is_amid_body = self._is_lingering = self._keeps_alive = False
        self._timer: asyncio.TimerHandle | None = None

    # Called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._real = transport
        super().connection_made(_Closing(transport, self))  # type: ignore[arg-type]
        self._await_head()
        if not self._lobby.enter(self):
            self._refuse(Overloaded("Too many connections are open, and all are at work (MAX_CONNECTIONS)"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._lobby.leave(self)
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> bytearray:
        if not self._buffer:
            self._buffer = bytearray(AT_ONCE_BYTES)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_lingering:
            self._n_discarded += nbytes
            if self._n_discarded > LINGER_BYTES:
                self.abort()
            return
        if not self._is_amid_body and self._timer is None:
            self._await_head()
        self._n_of_head = 0 if self._is_amid_message else nbytes
        self._n_framing += nbytes
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))
        if self._n_framing > MAX_FRAMING + self._n_body and not self._is_lingering:
            self._refuse(HeadTooLarge(f"A request's headers and chunk sizes may take {MAX_FRAMING} bytes"))

    # Called by the parser

    def on_message_begin(self) -> None:
        self._is_amid_message = True
        self._n_framing, self._n_of_head, self._n_body = self._n_of_head, 0, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._is_amid_body = True
        super().on_headers_complete()
        # An answer that leaves before the body has come in says that it ends the connection.
        self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        self._n_framing -= len(body)
        self._n_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_amid_body = self._is_amid_message = False
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive
        self._lobby.work(self)
        super().on_message_complete()

    # Called by uvicorn

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # or it would take in requests without end, as it answers the first
        elif self._is_amid_body:
            self.transport.close()
        elif not self._real.is_closing():
            self._lobby.wait(self)

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedHttp(msg))

    def shutdown(self) -> None:
        if self._is_lingering:
            self.abort()
        else:
            self._keeps_alive = False
            super().shutdown()

    def _unsupported_upgrade_warning(self) -> None:
        """A caller who asks for another protocol is answered in this one, and that is no news."""

    # The ends of a connection

    def abort(self) -> None:
        self._real.abort()

    def close(self) -> None:
        """At once if the request has come in whole, or none was begun."""
        if self._is_amid_body and not self._real.is_closing():
            self._linger()
        else:
            self._real.close()

    def _refuse(self, refusal: InferenceError) -> None:
        """Answer in place of the application, unless it has begun to."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.pipeline.clear()
        self._real.write(plain_http(refusal))
        self._linger()

    def _linger(self) -> None:
        if self._is_lingering:
            return
        self._is_lingering = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        if self._real.can_write_eof():
            self._real.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_S, self.abort)
        self._lobby.wait(self)

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Closing:
    """A transport that its connection closes."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._connection.close()
