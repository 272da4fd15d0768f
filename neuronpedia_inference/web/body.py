"""Reading a request's body: within its bound, as JSON, as an object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from email.message import Message
from typing import Any

from starlette.requests import Request

from neuronpedia_inference.errors import BodyTooLarge
from neuronpedia_inference.operations import InvalidBody
from neuronpedia_inference.operations.pacing import paced
from neuronpedia_inference.web.parsing import MAX_CONTAINERS, n_containers, parsed

DISCARD_S, DISCARD_BYTES = 5.0, 2**26
"""How much of a refused body is still taken in, and thrown away."""


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
    arriving = request.stream()
    if announced.isdecimal() and int(announced) > max_bytes:
        if int(announced) <= DISCARD_BYTES:
            await _discard(arriving)
        raise refusal
    chunks = bytearray()
    async for chunk in arriving:
        if len(chunks) + len(chunk) > max_bytes:
            await _discard(arriving)
            raise refusal
        chunks += chunk
        n_inside += n_containers(chunk)
        if n_inside > MAX_CONTAINERS:
            await _discard(arriving)
            raise BodyTooLarge(
                f"The request body has more than {MAX_CONTAINERS} objects and lists (brackets in texts count). "
                "Send less at once."
            )
    return bytes(chunks)


async def _discard(arriving: AsyncIterator[bytes]) -> None:
    """The rest of a body that is refused, within bounds: most clients read an answer only when they have sent all."""
    n_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for chunk in arriving:
                n_bytes += len(chunk)
                if n_bytes > DISCARD_BYTES:
                    return


def _is_json(header: str) -> bool:
    message = Message()
    message["content-type"] = header or "none/none"
    kind = message.get_content_type()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _invalid(kind: str, message: str) -> InvalidBody:
    return InvalidBody(message, [{"type": kind, "loc": [], "msg": message}])
