"""The web side of a function: HTTP in, ASGI inputs to a container, its messages out again as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from modal._serialization import deserialize_data_format, deserialize_proto_params, serialize, serialize_data_format
from modal_proto import api_pb2

from tests.modal.local_modal.calls import Calls
from tests.modal.local_modal.records import Call, Function

ASGI = api_pb2.DATA_FORMAT_ASGI


class Front:
    """Serves one web method of a function. Query values named as class parameters choose the pool, as at Modal."""

    def __init__(self, calls: Calls, function_id: str, method: str) -> None:
        self._calls = calls
        self._function_id = function_id
        self._method = method

    @property
    def _function(self) -> Function:
        """As it was deployed last."""
        return self._calls.objects.functions[self._function_id]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        call = self._start(request)
        self._send(call, {"type": "http.request", "body": await request.read(), "more_body": False})
        response: web.StreamResponse | None = None
        try:
            async for message in self._messages(call):
                if message["type"] == "http.response.start":
                    response = _response(message)
                    await response.prepare(request)
                elif message["type"] == "http.response.body" and response is not None:
                    await response.write(message["body"])
        finally:
            # The caller is gone, or has everything.
            self._send(call, {"type": "http.disconnect"})
        return response or web.Response(status=500, text="the container gave no answer")

    def _start(self, request: web.Request) -> Call:
        defaults = self._calls.default_params(self._function, {})
        known = deserialize_proto_params(defaults)
        given = {name: value for name, value in request.query.items() if name in known}
        call = self._calls.call(self._calls.pool_of(self._function, self._calls.default_params(self._function, given)))
        body = api_pb2.FunctionInput(
            args=serialize(((_scope(request),), {})),
            data_format=api_pb2.DATA_FORMAT_PICKLE,
            method_name=self._method,
        )
        self._calls.put(call, [api_pb2.FunctionPutInputsItem(input=body)])
        return call

    def _send(self, call: Call, message: dict[str, Any]) -> None:
        data = serialize_data_format(message, ASGI)
        call.data_in.append(api_pb2.DataChunk(data_format=ASGI, data=data, index=len(call.data_in) + 1))
        self._calls.bell.ring()

    async def _messages(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        """What the application sends, until it has ended its answer or its container has failed."""
        seen = 0
        while True:
            await self._calls.bell.until(lambda seen=seen: len(call.data_out) > seen or call.outputs)
            for chunk in call.data_out[seen:]:
                seen += 1
                yield deserialize_data_format(chunk.data, ASGI, None)
            if call.outputs and len(call.data_out) == seen:
                return


def _response(start: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(status=start["status"])
    for name, value in start["headers"]:
        response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
    return response


def _scope(request: web.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "query_string": request.query_string.encode(),
        "headers": [(name.lower(), value) for name, value in request.raw_headers],
        "client": ("127.0.0.1", 1),
    }
