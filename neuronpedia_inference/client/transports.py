"""Ways to a service: over HTTP, to a class deployed on Modal, or in this process. Each in two forms, for threads and
for coroutines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol

Body = Mapping[str, Any]
Answer = dict[str, Any]


class Transport(Protocol):
    """Asks operations by name. Every error is an InferenceError of the service's own class."""

    def ask(self, operation: str, body: Body) -> Answer:
        """The answer's JSON."""
        ...

    def ask_tensors(self, operation: str, body: Body) -> bytes:
        """The answer as a file of tensors."""
        ...

    def stream(self, operation: str, body: Body) -> Iterator[Answer]:
        """The answer's events. Closing the iterator ends the request."""
        ...

    def capabilities(self) -> Answer:
        """What the service says of itself."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class AsyncTransport(Protocol):
    """The same, for coroutines."""

    async def ask(self, operation: str, body: Body) -> Answer: ...

    async def ask_tensors(self, operation: str, body: Body) -> bytes: ...

    def stream(self, operation: str, body: Body) -> AsyncIterator[Answer]: ...

    async def capabilities(self) -> Answer: ...

    async def close(self) -> None: ...
