"""gRPC plumbing: an object's methods, found by name, as Modal's service."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from google.protobuf.message_factory import GetMessageClass
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream
from modal_proto import api_pb2


class Service:
    """Serves each RPC with the first of `parts` that has a method of its name.

    A coroutine method answers once; an async generator method streams.
    """

    def __init__(self, *parts: object) -> None:
        self._parts = parts

    def __mapping__(self) -> dict[str, Handler]:
        service = api_pb2.DESCRIPTOR.services_by_name["ModalClient"]
        return {
            f"/{service.full_name}/{method.name}": Handler(
                self._answer(method.name),
                Cardinality.UNARY_STREAM if method.server_streaming else Cardinality.UNARY_UNARY,
                GetMessageClass(method.input_type),
                GetMessageClass(method.output_type),
            )
            for method in service.methods
        }

    def _answer(self, name: str) -> Callable[[Stream[Any, Any]], Any]:
        method = next((getattr(part, name) for part in self._parts if hasattr(part, name)), None)

        async def answer(stream: Stream[Any, Any]) -> None:
            request = await stream.recv_message()
            if method is None:
                raise GRPCError(Status.UNIMPLEMENTED, f"the local control plane does not know {name}")
            if inspect.isasyncgenfunction(method):
                async for message in method(request):
                    await stream.send_message(message)
            else:
                await stream.send_message(await method(request))

        return answer
