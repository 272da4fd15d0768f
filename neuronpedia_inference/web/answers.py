"""What leaves the server: JSON bodies, and the one body that every error has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from neuronpedia_inference.errors import (
    BodyTooLarge,
    EngineFailed,
    Forbidden,
    HeadTooLarge,
    InferenceError,
    MalformedHttp,
    OutOfMemory,
    RequestTimeout,
    Unauthorized,
    Unavailable,
)
from neuronpedia_inference.observability import bound_request_id, new_request_id, request_id
from neuronpedia_inference.operations import InvalidBody

LONGEST_TEXT = 2000
LEFT_UNREAD = (BodyTooLarge, Forbidden, HeadTooLarge, MalformedHttp, RequestTimeout, Unauthorized)


@dataclass(frozen=True)
class Problem:
    """An error as the caller sees it."""

    status: int
    code: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What else its body has."""

    def body(self) -> dict[str, Any]:
        return {"error": self.message, "code": self.code, "request_id": request_id(), **self.beside}


def json_bytes(value: Any) -> bytes:
    """Strict JSON. Raises EngineFailed where a number is NaN or infinite, which JSON cannot say."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError as exc:
        raise EngineFailed("The answer holds NaN or infinite numbers, which JSON cannot express") from exc
    return text.encode("ascii")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Raises EngineFailed like `json_bytes`, so before any header is sent."""
    return Response(json_bytes(value), status, dict(headers or {}), media_type="application/json")


def plain_http(refusal: InferenceError) -> bytes:
    """A whole answer, for where there is no application; its connection ends."""
    with bound_request_id(new_request_id("")) as id_:
        problem = problem_of(refusal)
        body = json_bytes(problem.body())
    headers = {"Content-Type": "application/json", **problem.headers, "Connection": "close", "X-Request-Id": id_}
    lines = [f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def problem_of(exc: BaseException) -> Problem:
    """The caller's view of any exception. Nothing of an unexpected one is shown but the request id."""
    if isinstance(exc, InvalidBody):
        detail = [{**entry, "loc": ["body", *entry["loc"]]} for entry in exc.detail]
        return Problem(exc.status, exc.code, _cut(exc.message), beside={"detail": detail})
    if isinstance(exc, MemoryError):
        exc = OutOfMemory("This machine ran out of memory. Send a shorter or smaller request, or try again soon.")
    if isinstance(exc, InferenceError):
        return Problem(exc.status, exc.code, _cut(exc.message), _headers_of(exc), exc.beside)
    if isinstance(exc, HTTPException):
        return _of_http(exc)
    return Problem(500, "internal", f"Internal error. The server's log has it under request id {request_id()}.")


def _headers_of(exc: InferenceError) -> dict[str, str]:
    if isinstance(exc, Unavailable):
        return {"Retry-After": str(exc.retry_after_s)}
    # The rest of the body stays unread, so the connection cannot be used again.
    return {"Connection": "close"} if isinstance(exc, LEFT_UNREAD) else {}


def _of_http(exc: HTTPException) -> Problem:
    """Unknown paths and methods, mostly."""
    status = HTTPStatus(exc.status_code)
    code = status.phrase.lower().replace(" ", "_").replace("-", "_")
    return Problem(status, code, _cut(str(exc.detail or status.phrase)), dict(exc.headers or {}))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
