"""RPCs that only the command line needs: lists, logs, files, prices, a login."""

from __future__ import annotations

from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from tests.modal.local_modal.objects import Objects
from tests.modal.local_modal.records import Function


class Desk:
    """What a person looks up or changes without deploying."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.rates: dict[str, str] = {}
        """What an account pays, as `modal billing rates` names it."""

    # Apps

    async def AppList(self, _: api_pb2.AppListRequest) -> api_pb2.AppListResponse:
        items = [
            api_pb2.AppListResponse.AppListItem(app_id=app.id, description=app.name, name=app.name, state=app.state)
            for app in self._objects.apps.values()
        ]
        return api_pb2.AppListResponse(apps=items)

    async def AppFetchLogs(self, request: api_pb2.AppFetchLogsRequest) -> api_pb2.AppFetchLogsResponse:
        lines = self._objects.apps[request.app_id].logs
        items = [api_pb2.TaskLogs(data=line, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT) for line in lines]
        return api_pb2.AppFetchLogsResponse(batches=[api_pb2.TaskLogsBatch(items=items)])

    async def TaskList(self, _: api_pb2.TaskListRequest) -> api_pb2.TaskListResponse:
        return api_pb2.TaskListResponse()

    # The autoscaler

    async def FunctionUpdateSchedulingParams(
        self, request: api_pb2.FunctionUpdateSchedulingParamsRequest
    ) -> api_pb2.FunctionUpdateSchedulingParamsResponse:
        settings = self._function(request.function_id).definition.autoscaler_settings
        settings.MergeFrom(request.settings)
        return api_pb2.FunctionUpdateSchedulingParamsResponse(current_settings=settings)

    async def FunctionGetSchedulingParams(
        self, request: api_pb2.FunctionGetSchedulingParamsRequest
    ) -> api_pb2.FunctionGetSchedulingParamsResponse:
        settings = self._function(request.function_id).definition.autoscaler_settings
        configuration = api_pb2.AutoscalerConfiguration(settings=settings)
        return api_pb2.FunctionGetSchedulingParamsResponse(autoscaler_configuration=configuration)

    def _function(self, id_: str) -> Function:
        return self._objects.functions[id_]

    # Volumes

    async def VolumeListFiles(
        self, request: api_pb2.VolumeListFilesRequest
    ) -> AsyncIterator[api_pb2.VolumeListFilesResponse]:
        root = self._objects.volumes[request.volume_id].folder
        folder = root / request.path.strip("/")
        entries = [
            api_pb2.FileEntry(
                path=str(one.relative_to(root)),
                type=api_pb2.FileEntry.FileType.DIRECTORY if one.is_dir() else api_pb2.FileEntry.FileType.FILE,
                size=one.stat().st_size,
            )
            for one in sorted(folder.iterdir())
        ]
        yield api_pb2.VolumeListFilesResponse(entries=entries)

    async def VolumeDelete(self, request: api_pb2.VolumeDeleteRequest) -> Empty:
        del self._objects.volumes[request.volume_id]
        return Empty()

    # The workspace

    async def WorkspaceNameLookup(self, _: Empty) -> api_pb2.WorkspaceNameLookupResponse:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name="local", username="local")

    async def WorkspaceBillingRates(
        self, _: api_pb2.WorkspaceBillingRatesRequest
    ) -> api_pb2.WorkspaceBillingRatesResponse:
        formatted = "\n".join(f"{name}: {rate}" for name, rate in self.rates.items())
        return api_pb2.WorkspaceBillingRatesResponse(rates=self.rates, formatted=formatted)

    async def TokenFlowCreate(self, _: api_pb2.TokenFlowCreateRequest) -> api_pb2.TokenFlowCreateResponse:
        return api_pb2.TokenFlowCreateResponse(token_flow_id="tf-1", web_url="http://127.0.0.1/login", wait_secret="w")

    async def TokenFlowWait(self, _: api_pb2.TokenFlowWaitRequest) -> api_pb2.TokenFlowWaitResponse:
        return api_pb2.TokenFlowWaitResponse(token_id="ak-new", token_secret="as-new", workspace_username="local")
