"""What an operation is, and the stream of events that some of them give."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlencode

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.schemas.common import Wire

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

Req = TypeVar("Req", bound=Wire)
In = TypeVar("In")
Out = TypeVar("Out")

IN_PATH = re.compile(r"\{(\w+)(?::path)?\}")
"""Fields in the path of a GET."""


@dataclass(frozen=True, kw_only=True)
class Operation(Generic[Req]):
    """One thing the service can do. Routes, Modal methods, CLI words and the reference follow these."""

    name: str
    path: str
    request: type[Req]
    response: type[Wire]
    """The body of the answer, or of each event when streamed."""
    summary: str
    run: Callable[[Req, Runtime], Awaitable[Wire]]
    """Answers once; raises `InferenceError`."""
    stream: Callable[[Req, Runtime], Awaitable[AsyncIterator[Wire]]] | None = None
    """Answers in cumulative events. Raises every 4xx when awaited, before it returns the iterator."""
    dialect: Literal["sse", "ndjson", "openai"] = "sse"
    """How events are sent: as server-sent events, if `stream` is set; or as lines of JSON in snake_case, a part of the
    answer each, unless it is off; or as OpenAI's, as are errors then."""
    method: Literal["POST", "PUT", "GET"] = "POST"
    """GET: fields are parts of the path or of the query, and there is no body."""
    casing: Literal["snake", "camel", "both"] = "snake"
    """Spelling of the answer when the request's keys do not show one, or it does not mirror them."""
    mirrors: bool = True
    """Whether the answer follows the spelling of the request's keys."""
    has_tensors: bool = False
    """Whether the answer may be a file of tensors."""
    from_tensors: Callable[[Mapping[str, Numbers]], dict[str, Any]] | None = None
    """Of a file of tensors the body that means the same, where it may be sent instead."""
    off_modal_because: str = ""
    """Why no Modal method offers it; empty where one does."""
    omits_null: bool = False
    """Leave unset optional fields out of the answer instead of sending null."""

    def streams(self, body: Mapping[str, Any]) -> bool:
        """Whether a body asks for events."""
        return self.stream is not None and bool(body.get("stream", self.dialect == "ndjson"))

    def address(self, body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
        """Where to ask for it and with which body, None for a GET: path with query, each text percent-encoded."""
        if self.method != "GET":
            return self.path, body
        path, rest = self.path, dict(body)
        for name in IN_PATH.findall(self.path):
            part = quote(str(rest.pop(name, "")), safe="")
            path = re.sub(rf"\{{{name}(:path)?\}}", lambda _, part=part: part, path)
        query = urlencode({name: value for name, value in rest.items() if value is not None})
        return f"{path}?{query}" if query else path, None


class Events(AsyncIterator[Out], Generic[In, Out]):
    """`turn` applied to every item of `source`.

    A class and not a generator, because closing a generator that was never started does not run its body: here
    `aclose` always reaches the source, which frees the rows of the generation.
    """

    media_type = "application/json"
    """Of all its pieces together, where they are bytes of one answer."""
    n_bytes: int | None = None
    """Of all its pieces together, where that is known before they are made."""

    def __init__(self, source: AsyncIterator[In], turn: Callable[[In], Out]) -> None:
        self._source = source
        self._turn = turn

    async def __anext__(self) -> Out:
        return self._turn(await anext(self._source))

    async def rest(self, seconds: float) -> None:
        """Leave the source alone for so long, or until it has ended, where it can tell."""
        await getattr(self._source, "rest", asyncio.sleep)(seconds)

    async def aclose(self) -> None:
        close: Any = getattr(self._source, "aclose", None)
        if close is not None:
            await close()


async def last(events: AsyncIterator[Out]) -> Out:
    """The final event of a stream that has at least one; the stream is closed in any case."""
    stream = Events(events, lambda event: event)
    try:
        final = await anext(stream)
        async for event in stream:
            final = event
        return final
    finally:
        await stream.aclose()
