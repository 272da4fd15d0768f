"""Reading a request's body: within its bounds, as JSON, as an object."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from typing import Any

from starlette.requests import Request

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.errors import BodyTooLarge, Overloaded, RequestTimeout
from neuronpedia_inference.operations import InvalidBody, Operation
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.tensor_files import MEDIA_TYPE, read_tensors
from neuronpedia_inference.web.parsing import MAX_CONTAINERS, n_containers, parsed

BODIES_AT_ONCE = 16
"""Bodies of the largest size that may be on their way in together; many more of an ordinary one."""


class Bodies:
    """The bodies of one server, as they come in."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        """max_bytes, timeout_s: of one body."""
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._n_inside = 0

    async def object(self, request: Request, operation: Operation[Any]) -> dict[str, Any]:
        """The body as a dictionary; of a file of tensors what the operation makes of it, where it takes one.

        Raises BodyTooLarge or Overloaded before a bound is passed in memory, RequestTimeout, or InvalidBody.
        """
        with self._room() as held:
            value = await self._value(request, operation, held)
        if not isinstance(value, dict):
            raise _invalid("dict_type", "The body must be a JSON object")
        return value

    async def _value(self, request: Request, operation: Operation[Any], held: _Held) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                raw = await self._read(request, held)
        except TimeoutError:
            raise RequestTimeout(
                f"The request body did not come in within {self._timeout_s:g} s (RECEIVE_TIMEOUT)"
            ) from None
        kind = _media_type(request.headers.get("content-type", ""))
        if operation.from_tensors is not None and kind == MEDIA_TYPE:
            return _of_tensors(raw, operation.from_tensors)
        if not _is_json(kind):
            also = f" or {MEDIA_TYPE}" if operation.from_tensors is not None else ""
            raise _invalid("content_type", f"Content-Type must be application/json{also}")
        try:
            return await paced(parsed(raw))
        except ValueError as exc:
            raise _invalid("json_invalid", f"The body is not valid JSON: {str(exc)[:200]}") from exc

    async def _read(self, request: Request, held: _Held) -> bytes:
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise self._too_large()
        chunks = bytearray()
        n_containers_inside = 0
        async for chunk in request.stream():
            if len(chunks) + len(chunk) > self._max_bytes:
                raise self._too_large()
            held.add(len(chunk))
            chunks += chunk
            n_containers_inside += n_containers(chunk)
            if n_containers_inside > MAX_CONTAINERS:
                raise BodyTooLarge(
                    f"The request body has more than {MAX_CONTAINERS} objects and lists (brackets in texts count). "
                    "Send less at once."
                )
        return bytes(chunks)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The request body is larger than {self._max_bytes} bytes. Send less at once, or raise MAX_BODY_BYTES."
        )

    @contextmanager
    def _room(self) -> Iterator[_Held]:
        """For what one body holds until it has been read."""
        held = _Held(self)
        try:
            yield held
        finally:
            self._n_inside -= held.n_bytes

    def take(self, n_bytes: int) -> None:
        """Raises Overloaded."""
        if self._n_inside + n_bytes > BODIES_AT_ONCE * self._max_bytes:
            raise Overloaded(
                f"Request bodies of {self._n_inside} bytes are on their way in already, which is nearly the most that "
                f"this server takes at once ({BODIES_AT_ONCE} × MAX_BODY_BYTES)."
            )
        self._n_inside += n_bytes


class _Held:
    def __init__(self, bodies: Bodies) -> None:
        self.n_bytes = 0
        self._bodies = bodies

    def add(self, n_bytes: int) -> None:
        self._bodies.take(n_bytes)
        self.n_bytes += n_bytes


def _of_tensors(raw: bytes, body_of: Callable[[Mapping[str, Numbers]], dict[str, Any]]) -> dict[str, Any]:
    try:
        tensors = read_tensors(raw)
    except ValueError as exc:
        raise _invalid("safetensors_invalid", f"The body is no file of tensors: {exc}") from None
    return body_of(tensors)


def _media_type(header: str) -> str:
    message = Message()
    message["content-type"] = header or "none/none"
    return message.get_content_type()


def _is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _invalid(kind: str, message: str) -> InvalidBody:
    return InvalidBody(message, [{"type": kind, "loc": [], "msg": message}])
