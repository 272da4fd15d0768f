"""The outermost layers of a request: its id and log line, and the one place where exceptions become answers."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuronpedia_inference.errors import let_go
from neuronpedia_inference.observability import bound_request_id, is_reported, new_request_id, report
from neuronpedia_inference.web.answers import Problem, problem_of
from neuronpedia_inference.web.dialects import Dialect, dialect_of
from neuronpedia_inference.web.sse import ClientLeft
from neuronpedia_inference.web.words import error_event, error_response

log = logging.getLogger(__name__)
ERROR_CODE = "neuronpedia_inference.error_code"
CALLER = "neuronpedia_inference.caller"
"""The name that goes with the secret of a request."""
ID_HEADER = "X-Request-Id"


@dataclass
class _Sent:
    """What has gone out so far."""

    status: int = 0
    body_bytes: int = 0
    dialect: Dialect | None = None
    """Of a stream."""

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.dialect = dialect_of(Headers(raw=message["headers"]).get("content-type", ""))
        elif message["type"] == "http.response.body":
            self.body_bytes += len(message.get("body", b""))


class RequestScope:
    """Gives the request its id (the caller's own if it is a sane one) and writes its line in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = _Sent()
        started = time.perf_counter()
        with bound_request_id(new_request_id(headers.get(ID_HEADER, ""))) as id_:

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)[ID_HEADER] = id_
                sent.note(message)
                await send(message)

            try:
                await self.app(scope, receive, send_with_id)
            finally:
                _log_request(scope, headers, sent, time.perf_counter() - started)


def _log_request(scope: Scope, headers: Headers, sent: _Sent, seconds: float) -> None:
    code = scope.get(ERROR_CODE)
    line: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": sent.status,
        "ms": round(seconds * 1000, 1),
        "in_bytes": headers.get("content-length", "?")[:20],
        "out_bytes": sent.body_bytes,
    }
    level = logging.DEBUG if scope["path"] in ("/health", "/ready", "/metrics") and not code else logging.INFO
    if scope.get(CALLER):
        line["caller"] = scope[CALLER]
    log.log(level, "request", extra={**line, **({"code": code} if code else {})})


class Boundary:
    """Turns every exception into the error body, or, once events have been sent, into the error event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = _Sent()

        async def noted_send(message: Message) -> None:
            sent.note(message)
            await send(message)

        try:
            await self.app(scope, receive, noted_send)
        except (ClientLeft, ClientDisconnect):
            scope[ERROR_CODE] = "client_left"
        except BaseException as exc:
            if not (isinstance(exc, Exception) or is_panic(exc)):
                raise
            problem = problem_of(exc)
            note_problem(scope, problem, exc)
            if not sent.status:
                await error_response(problem, scope)(scope, receive, send)
            elif sent.dialect is not None:
                await send({"type": "http.response.body", "body": error_event(problem, scope, sent.dialect)})
            elif is_reported(exc):
                raise
            # else the server stops: the connection of an answer that is not complete is closed, which says so
            let_go(exc)


def is_panic(exc: BaseException) -> bool:
    """Whether native code written in Rust, such as pydantic's, has given up, as where memory is wanting.

    It raises a class that cannot be imported and is no Exception; its request ends, and nothing else.
    """
    return type(exc).__name__ == "PanicException"


def note_problem(scope: Scope, problem: Problem, exc: BaseException) -> None:
    """Into the log: a code for what the caller did wrong, a traceback for what we did."""
    scope[ERROR_CODE] = problem.code
    if is_reported(exc):
        log.error("request failed", exc_info=exc, extra={"code": problem.code})
    report(exc)
