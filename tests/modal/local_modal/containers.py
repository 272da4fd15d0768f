"""Containers: Modal's own entry point in a subprocess, with a gRPC socket of its own."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib.server import Server
from modal_proto import api_pb2

from tests.modal.local_modal.records import Input, Pool
from tests.modal.local_modal.rpc import Service

if TYPE_CHECKING:
    from tests.modal.local_modal.plane import Plane

KEPT = ("PATH", "LANG", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
"""What a container gets from the machine it runs on; all else comes from its image and its secrets."""
FAILURE = api_pb2.GenericResult.GENERIC_STATUS_FAILURE


class Container:
    """One process. It answers the RPCs that come over its own socket."""

    def __init__(self, plane: Plane, pool: Pool) -> None:
        self.id = plane.objects.new_id("ta")
        self.pool = pool
        self.log: list[str] = []
        self.running: dict[str, Input] = {}
        self.cancelled: list[str] = []
        self.most_running = 0
        self.n_log_lines_at_snapshot = 0
        self.n_answered = 0
        self.failure: api_pb2.GenericResult | None = None
        self.exit_code: int | None = None
        self._plane = plane
        self._stopping = False
        # A socket's path has room for about a hundred characters, fewer than pytest's own folders take.
        self._folder = Path(tempfile.mkdtemp(prefix="modal-"))

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return "".join(self.log)

    async def run(self) -> None:
        """Start the process and stay until it has ended."""
        address = self._folder / "rpc"
        server = Server([Service(self, self._plane.calls, self._plane.objects, self._plane.store)])
        await server.start(path=str(address))
        try:
            await self._run_process(f"unix://{address}")
        finally:
            server.close()
            await server.wait_closed()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._give_up_inputs()

    def stop(self) -> None:
        """Let it finish what it runs and leave, as Modal does when it scales down."""
        self._stopping = True
        self._plane.bell.ring()

    def interrupt(self) -> None:
        """As Modal does when it takes the machine away."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        if self.exit_code is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    async def _run_process(self, address: str) -> None:
        arguments = self._folder / "arguments"
        arguments.write_bytes(self._arguments().SerializeToString())
        (self._folder / "sitecustomize.py").write_text(self._plane.fault)
        root = self._plane.store.root_of(self.pool.function.definition.mount_ids)
        command, env = self._mounted(
            [sys.executable, "-m", "modal._container_entrypoint"],
            {
                **{name: os.environ[name] for name in KEPT if name in os.environ},
                "HOME": str(self._folder),
                "PYTHONPATH": f"{root}:{self._folder}",
                **self._image_env(),
                **self._secret_env(),
                "MODAL_SERVER_URL": address,
                "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
                "MODAL_IS_REMOTE": "1",
                "MODAL_TASK_ID": self.id,
                "MODAL_RESTORE_STATE_PATH": str(self._folder / "restore.json"),
                **({"MODAL_ENABLE_SNAP_RESTORE": "1"} if self._snapshots else {}),
            },
        )
        self.process = await asyncio.create_subprocess_exec(
            *command,
            env=env,
            cwd=root,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=2**24,
        )
        assert self.process.stdout
        async for line in self.process.stdout:
            self.log.append(line.decode(errors="replace"))
            self.pool.function.app.logs.append(self.log[-1])
            self._plane.bell.ring()
        self.exit_code = await self.process.wait()

    def _mounted(self, command: list[str], env: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """Volumes at their mount paths, or, where this user may not mount, their folders in place of these paths."""
        mounts = {
            mount.mount_path: str(self._plane.objects.volumes[mount.volume_id].folder)
            for mount in self.pool.function.definition.volume_mounts
        }
        if self._plane.can_mount:
            for path in mounts:
                Path(path).mkdir(parents=True, exist_ok=True)  # stays empty outside the container
            binds = "".join(f"mount --bind {shlex.quote(here)} {path} && " for path, here in mounts.items())
            return ["unshare", "-m", "sh", "-c", f'{binds}exec "$@"', "sh", *command], env
        for path, here in mounts.items():
            moved = {name: here + value[len(path) :] for name, value in env.items() if value.startswith(path)}
            env = {**env, **moved}
        return command, env

    def _arguments(self) -> api_pb2.ContainerArguments:
        definition = api_pb2.Function()
        definition.CopyFrom(self.pool.function.definition)
        definition.is_checkpointing_function = self._snapshots
        app = self.pool.function.app
        return api_pb2.ContainerArguments(
            task_id=self.id,
            function_id=self.pool.id,
            app_id=app.id,
            function_def=definition,
            serialized_params=self.pool.params,
            environment_name="main",
            checkpoint_id="ch-1" if self._snapshots else None,
            app_layout=self._plane.objects.layout(app),
        )

    @property
    def _snapshots(self) -> bool:
        return self._plane.snapshots and self.pool.function.definition.checkpointing_enabled

    def _image_env(self) -> dict[str, str]:
        commands = self._plane.objects.commands_of(self.pool.function.definition.image_id)
        pairs = [shlex.split(line[4:])[0] for line in commands if line.startswith("ENV ")]
        return dict(pair.split("=", 1) for pair in pairs)

    def _secret_env(self) -> dict[str, str]:
        ids = self.pool.function.definition.secret_ids
        return {name: value for id_ in ids for name, value in self._plane.objects.secrets[id_].values.items()}

    def _give_up_inputs(self) -> None:
        """Whoever waits on a container that is gone is told why."""
        lost = list(self.running.values())
        if self.failure is not None or self.exit_code:
            lost += self.pool.waiting
            self.pool.waiting.clear()
        gone = api_pb2.GenericResult(status=FAILURE, exception=f"the container ended with exit code {self.exit_code}")
        for one in lost:
            self._plane.calls.finish(one, self.failure or gone)
        self.running.clear()

    # RPCs of the container

    async def ContainerHello(self, _: Empty) -> Empty:
        return Empty()

    async def ContainerHeartbeat(self, _: api_pb2.ContainerHeartbeatRequest) -> api_pb2.ContainerHeartbeatResponse:
        # Modal pushes cancellations with the answer to a heartbeat, which comes every fifteen seconds.
        await self._plane.bell.until(lambda: self.cancelled, 14)
        cancelled, self.cancelled = self.cancelled, []
        if not cancelled:
            return api_pb2.ContainerHeartbeatResponse()
        return api_pb2.ContainerHeartbeatResponse(cancel_input_event=api_pb2.CancelInputEvent(input_ids=cancelled))

    async def ContainerCheckpoint(self, _: api_pb2.ContainerCheckpointRequest) -> Empty:
        """No snapshot is taken: the process is looked at, and goes on as one that was restored."""
        self._plane.at_snapshot(self)
        self.n_log_lines_at_snapshot = len(self.log)
        (self._folder / "restore.json").write_text(f'{{"task_id": "{self.id}"}}')
        return Empty()

    async def FunctionGetDynamicConcurrency(
        self, request: api_pb2.FunctionGetDynamicConcurrencyRequest
    ) -> api_pb2.FunctionGetDynamicConcurrencyResponse:
        """There is never another container, so this one takes as many inputs as it may."""
        return api_pb2.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)

    async def FunctionGetInputs(self, _: api_pb2.FunctionGetInputsRequest) -> api_pb2.FunctionGetInputsResponse:
        waiting = self.pool.waiting
        idle_s = self.pool.function.definition.autoscaler_settings.scaledown_window or 60
        while not await self._plane.bell.until(lambda: waiting or self._stopping, idle_s):
            if not self.running:
                self._stopping = True
        if self._stopping:
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        one = waiting.popleft()
        self.running[one.id] = one
        self.most_running = max(self.most_running, len(self.running))
        item = api_pb2.FunctionGetInputsItem(
            input_id=one.id,
            input=one.body,
            function_call_id=one.call.id,
            function_call_invocation_type=one.invocation,
        )
        return api_pb2.FunctionGetInputsResponse(inputs=[item])

    async def FunctionPutOutputs(self, request: api_pb2.FunctionPutOutputsRequest) -> Empty:
        for item in request.outputs:
            one = self.running.pop(item.input_id, None)
            if one is not None:
                self.n_answered += 1
                self._plane.calls.finish(one, item.result, item.data_format)
        return Empty()

    async def FunctionCallGetDataIn(
        self, request: api_pb2.FunctionCallGetDataRequest
    ) -> AsyncIterator[api_pb2.DataChunk]:
        call = self._plane.calls.calls[request.function_call_id]
        async for chunk in self._plane.calls.follow(call.data_in, request.last_index):
            yield chunk

    async def FunctionCallPutDataOut(self, request: api_pb2.FunctionCallPutDataRequest) -> Empty:
        self._plane.calls.calls[request.function_call_id].data_out.extend(request.data_chunks)
        self._plane.bell.ring()
        return Empty()

    async def ContainerStop(self, _: api_pb2.ContainerStopRequest) -> api_pb2.ContainerStopResponse:
        """A container that asks for its own end."""
        self.stop()
        return api_pb2.ContainerStopResponse()

    async def TaskResult(self, request: api_pb2.TaskResultRequest) -> Empty:
        if request.result.status == FAILURE:
            self.failure = request.result
        return Empty()
