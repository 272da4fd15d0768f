"""Reading a request's body: within its bound, as JSON, as an object."""

from __future__ import annotations

from email.message import Message
from typing import Any

from starlette.requests import Request

from neuronpedia_inference.errors import BodyTooLarge
from neuronpedia_inference.operations import InvalidBody
from neuronpedia_inference.operations.pacing import paced
from neuronpedia_inference.web.parsing import MAX_CONTAINERS, n_containers, parsed


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a dictionary. Raises BodyTooLarge before the bound is passed in memory, or InvalidBody."""
    raw = await _read(request, max_bytes)
    if not _is_json(request.headers.get("content-type", "")):
        raise _invalid("content_type", "Content-Type must be application/json")
    try:
        value = await paced(parsed(raw))
    except ValueError as exc:
        raise _invalid("json_invalid", f"The body is not valid JSON: {str(exc)[:200]}") from exc
    if not isinstance(value, dict):
        raise _invalid("dict_type", "The body must be a JSON object")
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    refusal = BodyTooLarge(
        f"The request body is larger than {max_bytes} bytes. Send less at once, or raise MAX_BODY_BYTES."
    )
    n_inside = 0
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise refusal
    chunks = bytearray()
    async for chunk in request.stream():
        if len(chunks) + len(chunk) > max_bytes:
            raise refusal
        chunks += chunk
        n_inside += n_containers(chunk)
        if n_inside > MAX_CONTAINERS:
            raise BodyTooLarge(
                f"The request body has more than {MAX_CONTAINERS} objects and lists (brackets in texts count). "
                "Send less at once."
            )
    return bytes(chunks)


def _is_json(header: str) -> bool:
    message = Message()
    message["content-type"] = header or "none/none"
    kind = message.get_content_type()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _invalid(kind: str, message: str) -> InvalidBody:
    return InvalidBody(message, [{"type": kind, "loc": [], "msg": message}])
