"""What the control plane remembers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2

if TYPE_CHECKING:
    from tests.modal.local_modal.containers import Container


Invocation = api_pb2.FunctionCallInvocationType.ValueType
SYNC: Invocation = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC


class Bell:
    """Wakes everybody who waits for something to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, ready: Callable[[], object], timeout_s: float | None = None) -> bool:
        """Whether `ready` came true in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not ready():
                    await self._event.wait()
        except TimeoutError:
            return bool(ready())
        return True


@dataclass
class App:
    id: str
    name: str
    state: api_pb2.AppState.ValueType
    functions: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    done: bool = False


@dataclass
class Image:
    id: str
    commands: tuple[str, ...]
    bases: tuple[str, ...]


@dataclass
class Secret:
    id: str
    name: str
    values: dict[str, str]


@dataclass
class Volume:
    id: str
    name: str
    folder: Path
    commits: int = 0


@dataclass
class Function:
    """A function, or the service function of a class (its tag ends with `.*`)."""

    id: str
    app: App
    tag: str
    definition: api_pb2.Function
    ranked: tuple[api_pb2.Function, ...] = ()
    """The definition once for each GPU that it may run on, in order of preference."""
    urls: dict[str, str] = field(default_factory=dict)
    """Web address by method; "" for a function."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """`TYPE:COUNT`, in order of preference."""
        wanted = [one.resources.gpu_config for one in self.ranked]
        return tuple(f"{gpu.gpu_type}:{gpu.count}" for gpu in wanted if gpu.gpu_type)

    @property
    def handle(self) -> api_pb2.FunctionHandleMetadata:
        made = self.definition
        methods = {
            name: api_pb2.FunctionHandleMetadata(
                function_name=method.function_name,
                function_type=method.function_type,
                web_url=self.urls.get(name, ""),
                is_method=True,
                use_method_name=name,
                definition_id=f"de-{self.id}",
                function_schema=method.function_schema,
                supported_input_formats=method.supported_input_formats,
                supported_output_formats=method.supported_output_formats,
                app_id=self.app.id,
            )
            for name, method in made.method_definitions.items()
        }
        return api_pb2.FunctionHandleMetadata(
            function_name=made.function_name,
            function_type=made.function_type,
            web_url=self.urls.get("", ""),
            definition_id=f"de-{self.id}",
            class_parameter_info=made.class_parameter_info,
            method_handle_metadata=methods,
            function_schema=made.function_schema,
            supported_input_formats=made.supported_input_formats,
            supported_output_formats=made.supported_output_formats,
            app_id=self.app.id,
        )


@dataclass(eq=False)
class Input:
    id: str
    idx: int
    call: Call
    body: api_pb2.FunctionInput
    invocation: Invocation


@dataclass(eq=False)
class Pool:
    """The containers of one function with one set of class parameters, and what waits for them."""

    id: str
    function: Function
    params: bytes
    waiting: deque[Input] = field(default_factory=deque)
    containers: list[Container] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    id: str
    pool: Pool
    n_inputs: int = 0
    outputs: list[api_pb2.FunctionGetOutputsItem] = field(default_factory=list)
    data_in: list[api_pb2.DataChunk] = field(default_factory=list)
    data_out: list[api_pb2.DataChunk] = field(default_factory=list)

    @property
    def n_unfinished(self) -> int:
        return self.n_inputs - len(self.outputs)
