"""RPCs that run things: calls, their inputs and outputs, streams and logs, as the client sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from google.protobuf.empty_pb2 import Empty
from modal._serialization import apply_defaults, serialize_proto_params
from modal_proto import api_pb2

from tests.modal.local_modal.objects import Objects
from tests.modal.local_modal.records import SYNC, Bell, Call, Function, Input, Invocation, Pool

STREAM_S = 50.0
"""A quiet stream is ended after this, and the client asks again."""


class Calls:
    """Puts inputs into pools and hands outputs back."""

    def __init__(self, objects: Objects, bell: Bell) -> None:
        self.objects = objects
        self.bell = bell
        self.pools: dict[str, Pool] = {}
        self.calls: dict[str, Call] = {}

    # Pools

    def pool_of(self, function: Function, params: bytes) -> Pool:
        """The pool of a function with these class parameters, made if need be."""
        for pool in self.pools.values():
            if pool.function is function and pool.params == params:
                return pool
        id_ = function.id if not params and not function.definition.is_class else self.objects.new_id("fu")
        self.pools[id_] = Pool(id_, function, params)
        return self.pools[id_]

    def default_params(self, function: Function, given: Mapping[str, object]) -> bytes:
        """Class parameters in the form the client sends them, defaults filled in."""
        info = function.definition.class_parameter_info
        if info.format != api_pb2.ClassParameterInfo.PARAM_SERIALIZATION_FORMAT_PROTO:
            return b""
        return serialize_proto_params(apply_defaults(given, info.schema))

    async def FunctionBindParams(
        self, request: api_pb2.FunctionBindParamsRequest
    ) -> api_pb2.FunctionBindParamsResponse:
        function = self.objects.functions[request.function_id]
        pool = self.pool_of(function, request.serialized_params)
        return api_pb2.FunctionBindParamsResponse(bound_function_id=pool.id, handle_metadata=function.handle)

    # Calls

    def call(self, pool: Pool) -> Call:
        call = Call(self.objects.new_id("fc"), pool)
        self.calls[call.id] = call
        return call

    def put(
        self, call: Call, items: Sequence[api_pb2.FunctionPutInputsItem], invocation: Invocation = SYNC
    ) -> list[Input]:
        """Queue inputs of a call; a container takes them."""
        put = [Input(self.objects.new_id("in"), item.idx, call, item.input, invocation) for item in items]
        call.n_inputs += len(put)
        call.pool.waiting.extend(put)
        self.bell.ring()
        return put

    async def FunctionMap(self, request: api_pb2.FunctionMapRequest) -> api_pb2.FunctionMapResponse:
        pool = self.pools.get(request.function_id)
        if pool is None:
            pool = self.pool_of(self.objects.functions[request.function_id], b"")
        call = self.call(pool)
        put = self.put(call, request.pipelined_inputs, request.function_call_invocation_type)
        return api_pb2.FunctionMapResponse(
            function_call_id=call.id, function_call_jwt=call.id, pipelined_inputs=_receipts(put)
        )

    async def FunctionPutInputs(self, request: api_pb2.FunctionPutInputsRequest) -> api_pb2.FunctionPutInputsResponse:
        put = self.put(self.calls[request.function_call_id], request.inputs)
        return api_pb2.FunctionPutInputsResponse(inputs=_receipts(put))

    async def FunctionFinishInputs(self, _: api_pb2.FunctionFinishInputsRequest) -> Empty:
        return Empty()

    async def FunctionGetOutputs(
        self, request: api_pb2.FunctionGetOutputsRequest
    ) -> api_pb2.FunctionGetOutputsResponse:
        call = self.calls[request.function_call_id]
        seen = int(request.last_entry_id.partition("-")[0] or 0)
        await self.bell.until(lambda: len(call.outputs) > seen, request.timeout)
        return api_pb2.FunctionGetOutputsResponse(
            outputs=call.outputs[seen:],
            last_entry_id=f"{len(call.outputs)}-0",
            num_unfinished_inputs=call.n_unfinished,
        )

    async def FunctionCallCancel(self, request: api_pb2.FunctionCallCancelRequest) -> Empty:
        self.cancel(self.calls[request.function_call_id])
        return Empty()

    def cancel(self, call: Call) -> None:
        """Drop what waits; tell the containers about what runs."""
        for one in [one for one in call.pool.waiting if one.call is call]:
            call.pool.waiting.remove(one)
        for container in call.pool.containers:
            container.cancelled += [one.id for one in container.running.values() if one.call is call]
        self.bell.ring()

    def finish(
        self,
        one: Input,
        result: api_pb2.GenericResult,
        data_format: api_pb2.DataFormat.ValueType = api_pb2.DATA_FORMAT_UNSPECIFIED,
    ) -> None:
        """Record the output of an input."""
        one.call.outputs.append(
            api_pb2.FunctionGetOutputsItem(idx=one.idx, input_id=one.id, result=result, data_format=data_format)
        )
        self.bell.ring()

    # Streams

    async def FunctionCallGetDataOut(
        self, request: api_pb2.FunctionCallGetDataRequest
    ) -> AsyncIterator[api_pb2.DataChunk]:
        call = self.calls[request.function_call_id]
        async for chunk in self.follow(call.data_out, request.last_index):
            yield chunk

    async def follow(self, chunks: list[api_pb2.DataChunk], last_index: int) -> AsyncIterator[api_pb2.DataChunk]:
        """Chunks as they come, from the one after `last_index`."""
        sent = last_index
        while await self.bell.until(lambda sent=sent: len(chunks) > sent, STREAM_S):
            fresh = chunks[sent:]
            sent += len(fresh)
            for chunk in fresh:
                yield chunk

    # Logs

    async def AppGetLogs(self, request: api_pb2.AppGetLogsRequest) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        app = self.objects.apps[request.app_id]
        sent = int(request.last_entry_id or 0)
        while await self.bell.until(lambda sent=sent: len(app.logs) > sent or app.done, request.timeout or 0.01):
            items = [
                api_pb2.TaskLogs(data=line, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT) for line in app.logs[sent:]
            ]
            sent += len(items)
            if items:
                yield api_pb2.TaskLogsBatch(entry_id=str(sent), items=items)
            elif app.done:
                yield api_pb2.TaskLogsBatch(app_done=True)
                return


def _receipts(put: list[Input]) -> list[api_pb2.FunctionPutInputsResponseItem]:
    return [api_pb2.FunctionPutInputsResponseItem(idx=one.idx, input_id=one.id, input_jwt=one.id) for one in put]
