"""A class deployed on Modal, asked by its methods: no HTTP, and the workspace's own tokens for a key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from neuronpedia_inference.client.failures import failure_from_text
from neuronpedia_inference.client.transports import Answer, Body
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations import by_name

CLASS = "Inference"
STREAMS = {"steer": "steer_stream"}
"""Methods that give events, by operation."""
RAISED = (ValueError, LookupError, RuntimeError, TimeoutError, MemoryError, OSError)
"""What the methods raise, all built in; their texts begin with the code."""


def deployed(app: str) -> Any:
    """An instance of the app's class. Raises ImportError where the package `modal` is not installed."""
    import modal

    return modal.Cls.from_name(app, CLASS)()


def _streaming(instance: Any, operation: str) -> Any:
    if operation not in STREAMS:
        raise InvalidRequest(f"{operation} does not stream")
    return getattr(instance, STREAMS[operation])


def _check_method(operation: str) -> None:
    because = by_name[operation].off_modal_because
    if because:
        raise InvalidRequest(f"{operation} is not offered on Modal: {because}")


def _for_tensors(body: Body) -> Body:
    return {**body, "format": "safetensors"}


class OnModal:
    """For threads."""

    def __init__(self, app: str) -> None:
        self._app, self._instance = app, deployed(app)

    def __repr__(self) -> str:
        return f"OnModal({self._app!r})"

    def ask(self, operation: str, body: Body) -> Answer:
        return self._call(operation, body)

    def ask_tensors(self, operation: str, body: Body) -> bytes:
        return self._call(operation, _for_tensors(body))

    def _call(self, operation: str, body: Body) -> Any:
        _check_method(operation)
        try:
            return getattr(self._instance, operation).remote(dict(body))
        except RAISED as exc:
            raise failure_from_text(exc) or exc from None

    def stream(self, operation: str, body: Body) -> Iterator[Answer]:
        try:
            yield from _streaming(self._instance, operation).remote_gen(dict(body))
        except RAISED as exc:
            raise failure_from_text(exc) or exc from None

    def capabilities(self) -> Answer:
        return self._instance.capabilities.remote()

    def close(self) -> None:
        """Nothing is held."""


class AsyncOnModal:
    """For coroutines."""

    def __init__(self, app: str) -> None:
        self._app, self._instance = app, deployed(app)

    def __repr__(self) -> str:
        return f"AsyncOnModal({self._app!r})"

    async def ask(self, operation: str, body: Body) -> Answer:
        return await self._call(operation, body)

    async def ask_tensors(self, operation: str, body: Body) -> bytes:
        return await self._call(operation, _for_tensors(body))

    async def _call(self, operation: str, body: Body) -> Any:
        _check_method(operation)
        try:
            return await getattr(self._instance, operation).remote.aio(dict(body))
        except RAISED as exc:
            raise failure_from_text(exc) or exc from None

    async def stream(self, operation: str, body: Body) -> AsyncIterator[Answer]:
        try:
            async for event in _streaming(self._instance, operation).remote_gen.aio(dict(body)):
                yield event
        except RAISED as exc:
            raise failure_from_text(exc) or exc from None

    async def capabilities(self) -> Answer:
        return await self._instance.capabilities.remote.aio()

    async def close(self) -> None:
        """Nothing is held."""
