"""RPCs that create things: apps, functions, classes, images, secrets, volumes."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal.local_modal.records import App, Function, Image, Secret, Volume

BUILDER_VERSION = "2025.06"
SUCCESS = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)


class Objects:
    """Apps, functions and what they are made of. Nothing here runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = itertools.count(1)
        self.apps: dict[str, App] = {}
        self.functions: dict[str, Function] = {}
        self.images: dict[str, Image] = {}
        self.secrets: dict[str, Secret] = {}
        self.volumes: dict[str, Volume] = {}
        self.n_requests_that_create = 0

    def new_id(self, prefix: str) -> str:
        return f"{prefix}-{next(self._ids):06d}"

    def app(self, name: str) -> App:
        """The deployed app of that name."""
        for app in self.apps.values():
            if app.name == name and app.state == api_pb2.APP_STATE_DEPLOYED and not app.done:
                return app
        raise GRPCError(Status.NOT_FOUND, f"App '{name}' not found")

    # Client, environment

    async def ClientHello(self, _: Empty) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse(image_builder_version=BUILDER_VERSION)

    async def EnvironmentGetOrCreate(
        self, _: api_pb2.EnvironmentGetOrCreateRequest
    ) -> api_pb2.EnvironmentGetOrCreateResponse:
        settings = api_pb2.EnvironmentSettings(image_builder_version=BUILDER_VERSION)
        metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    # Apps

    async def AppGetByDeploymentName(
        self, request: api_pb2.AppGetByDeploymentNameRequest
    ) -> api_pb2.AppGetByDeploymentNameResponse:
        try:
            return api_pb2.AppGetByDeploymentNameResponse(app_id=self.app(request.name).id)
        except GRPCError:
            return api_pb2.AppGetByDeploymentNameResponse()

    async def AppCreate(self, request: api_pb2.AppCreateRequest) -> api_pb2.AppCreateResponse:
        self.n_requests_that_create += 1
        app = App(self.new_id("ap"), request.description, request.app_state)
        self.apps[app.id] = app
        page = f"http://127.0.0.1/apps/{app.id}"
        return api_pb2.AppCreateResponse(app_id=app.id, app_page_url=page, app_logs_url=page)

    async def AppGetLayout(self, request: api_pb2.AppGetLayoutRequest) -> api_pb2.AppGetLayoutResponse:
        return api_pb2.AppGetLayoutResponse(app_layout=self.layout(self.apps[request.app_id]))

    def layout(self, app: App) -> api_pb2.AppLayout:
        """Every function and class of an app, as its containers and its next deployment see it."""
        functions = [
            api_pb2.Object(object_id=id_, function_handle_metadata=self.functions[id_].handle)
            for id_ in app.functions.values()
        ]
        classes = [
            api_pb2.Object(object_id=id_, class_handle_metadata=api_pb2.ClassHandleMetadata())
            for id_ in app.classes.values()
        ]
        parts = [self._part(id_) for id_ in dict.fromkeys(self._dependencies(app))]
        return api_pb2.AppLayout(
            objects=[*functions, *classes, *parts], function_ids=app.functions, class_ids=app.classes
        )

    def _dependencies(self, app: App) -> Iterable[str]:
        for id_ in app.functions.values():
            yield from (one.object_id for one in self.functions[id_].definition.object_dependencies)

    def _part(self, id_: str) -> api_pb2.Object:
        if id_ in self.volumes:
            return api_pb2.Object(object_id=id_, volume_metadata=api_pb2.VolumeMetadata(name=self.volumes[id_].name))
        return api_pb2.Object(object_id=id_)

    async def AppPublish(self, request: api_pb2.AppPublishRequest) -> api_pb2.AppPublishResponse:
        app = self.apps[request.app_id]
        app.name = request.name or app.name
        app.state = request.app_state
        app.functions, app.classes = dict(request.function_ids), dict(request.class_ids)
        return api_pb2.AppPublishResponse(url=f"http://127.0.0.1/apps/{app.id}", deployed_at=time.time())

    async def AppHeartbeat(self, _: api_pb2.AppHeartbeatRequest) -> Empty:
        return Empty()

    # Functions and classes

    async def FunctionPrecreate(self, request: api_pb2.FunctionPrecreateRequest) -> api_pb2.FunctionPrecreateResponse:
        self.n_requests_that_create += 1
        definition = api_pb2.Function(
            function_name=request.function_name,
            function_type=request.function_type,
            function_schema=request.function_schema,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        for name, method in request.method_definitions.items():
            definition.method_definitions[name].CopyFrom(method)
        id_ = request.existing_function_id or self.new_id("fu")
        made = Function(id_, self.apps[request.app_id], request.function_name, definition)
        made.urls = self.functions[id_].urls if id_ in self.functions else {}
        self.functions[id_] = made
        return api_pb2.FunctionPrecreateResponse(function_id=id_, handle_metadata=made.handle)

    async def FunctionCreate(self, request: api_pb2.FunctionCreateRequest) -> api_pb2.FunctionCreateResponse:
        made = self.functions[request.existing_function_id]
        ranked = [one.function for one in request.function_data.ranked_functions]
        made.definition = ranked[0] if ranked else request.function
        made.ranked = tuple(ranked or [request.function])
        await self.on_function(made)
        for name, method in made.definition.method_definitions.items():
            method.web_url = made.urls.get(name, "")
        made.definition.web_url = made.urls.get("", "")
        return api_pb2.FunctionCreateResponse(
            function_id=made.id, function=made.definition, function_data=_data(made), handle_metadata=made.handle
        )

    async def on_function(self, function: Function) -> None:
        """Called once a function has its definition."""
        raise NotImplementedError

    async def ClassCreate(self, request: api_pb2.ClassCreateRequest) -> api_pb2.ClassCreateResponse:
        return api_pb2.ClassCreateResponse(
            class_id=request.existing_class_id or self.new_id("cs"), handle_metadata=api_pb2.ClassHandleMetadata()
        )

    async def ClassGet(self, request: api_pb2.ClassGetRequest) -> api_pb2.ClassGetResponse:
        id_ = _named("Class", request.object_tag, self.app(request.app_name).classes)
        return api_pb2.ClassGetResponse(class_id=id_, handle_metadata=api_pb2.ClassHandleMetadata())

    async def FunctionGet(self, request: api_pb2.FunctionGetRequest) -> api_pb2.FunctionGetResponse:
        id_ = _named("Function", request.object_tag, self.app(request.app_name).functions)
        found = self.functions[id_]
        return api_pb2.FunctionGetResponse(function_id=id_, handle_metadata=found.handle, function=_data(found))

    # Images: never built; their commands are kept for the tests to read

    async def ImageGetOrCreate(self, request: api_pb2.ImageGetOrCreateRequest) -> api_pb2.ImageGetOrCreateResponse:
        self.n_requests_that_create += 1
        image = Image(
            self.new_id("im"),
            tuple(request.image.dockerfile_commands),
            tuple(base.image_id for base in request.image.base_images),
        )
        self.images[image.id] = image
        metadata = api_pb2.ImageMetadata(image_builder_version=BUILDER_VERSION)
        return api_pb2.ImageGetOrCreateResponse(image_id=image.id, result=SUCCESS, metadata=metadata)

    def commands_of(self, image_id: str) -> Iterable[str]:
        """The Dockerfile lines of an image and of those below it, lowest first."""
        image = self.images[image_id]
        for base in image.bases:
            yield from self.commands_of(base)
        yield from image.commands

    # Secrets

    async def SecretGetOrCreate(self, request: api_pb2.SecretGetOrCreateRequest) -> api_pb2.SecretGetOrCreateResponse:
        secret = self._secret(request)
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret.id, metadata=_metadata(secret))

    def _secret(self, request: api_pb2.SecretGetOrCreateRequest) -> Secret:
        name, values = request.deployment_name, dict(request.env_dict)
        found = next((one for one in self.secrets.values() if name and one.name == name), None)
        if request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            if found is None:
                raise GRPCError(Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'")
            return found
        if found and request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"Secret '{name}' exists already")
        secret = Secret(found.id if found else self.new_id("st"), name, values)
        self.secrets[secret.id] = secret
        return secret

    async def SecretList(self, _: api_pb2.SecretListRequest) -> api_pb2.SecretListResponse:
        named = [one for one in self.secrets.values() if one.name]
        items = [api_pb2.SecretListItem(label=one.name, secret_id=one.id, metadata=_metadata(one)) for one in named]
        return api_pb2.SecretListResponse(items=items, environment_name="main")

    async def SecretDelete(self, request: api_pb2.SecretDeleteRequest) -> Empty:
        del self.secrets[request.secret_id]
        return Empty()

    # Volumes

    async def VolumeGetOrCreate(self, request: api_pb2.VolumeGetOrCreateRequest) -> api_pb2.VolumeGetOrCreateResponse:
        volume = self.volume(request.deployment_name)
        metadata = api_pb2.VolumeMetadata(name=volume.name)
        return api_pb2.VolumeGetOrCreateResponse(volume_id=volume.id, metadata=metadata)

    def volume(self, name: str) -> Volume:
        """The volume of that name, made if need be."""
        found = next((one for one in self.volumes.values() if one.name == name), None)
        if found is None:
            found = Volume(self.new_id("vo"), name, self._folder / "volumes" / name)
            found.folder.mkdir(parents=True)
            self.volumes[found.id] = found
        return found

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest) -> api_pb2.VolumeCommitResponse:
        self.volumes[request.volume_id].commits += 1
        return api_pb2.VolumeCommitResponse()

    async def VolumeReload(self, _: api_pb2.VolumeReloadRequest) -> Empty:
        return Empty()

    async def ImageJoinStreaming(
        self, _: api_pb2.ImageJoinStreamingRequest
    ) -> AsyncIterator[api_pb2.ImageJoinStreamingResponse]:
        yield api_pb2.ImageJoinStreamingResponse(result=SUCCESS, eof=True)


def _data(function: Function) -> api_pb2.FunctionData:
    """A definition as the client reads it back: shared fields on top, one entry per GPU below."""
    shared = {field.name for field in api_pb2.FunctionData.DESCRIPTOR.fields}
    given = {field.name: value for field, value in function.definition.ListFields() if field.name in shared}
    ranked = [api_pb2.FunctionData.RankedFunction(rank=rank, function=one) for rank, one in enumerate(function.ranked)]
    return api_pb2.FunctionData(**given, ranked_functions=ranked)


def _named(kind: str, name: str, known: dict[str, str]) -> str:
    if name not in known:
        raise GRPCError(Status.NOT_FOUND, f"{kind} '{name}' not found")
    return known[name]


def _metadata(secret: Secret) -> api_pb2.SecretMetadata:
    return api_pb2.SecretMetadata(name=secret.name, keys=list(secret.values))
