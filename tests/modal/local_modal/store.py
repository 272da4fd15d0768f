"""Files and blobs: what the client uploads, and the folder that a container sees of it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from aiohttp import web
from modal_proto import api_pb2

SOURCE_ROOT = PurePosixPath("/root")
"""Where Modal puts a project's own source, and where its containers start."""


class Store:
    """Blobs by id, over plain HTTP; files by hash; mounts as lists of files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = itertools.count(1)
        self._mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.url = ""
        """Set once the HTTP server listens."""
        for name in ("blobs", "files", "roots"):
            (folder / name).mkdir(parents=True)

    # HTTP

    def routes(self) -> list[web.RouteDef]:
        return [web.put("/blob/{id}", self._put), web.get("/blob/{id}", self._get)]

    async def _put(self, request: web.Request) -> web.Response:
        data = await request.read()
        (self._folder / "blobs" / request.match_info["id"]).write_bytes(data)
        return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def _get(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(self._folder / "blobs" / request.match_info["id"])

    # RPCs

    async def BlobCreate(self, _: api_pb2.BlobCreateRequest) -> api_pb2.BlobCreateResponse:
        blob = f"bl-{next(self._ids)}"
        urls = api_pb2.UploadUrlList(items=[f"{self.url}/blob/{blob}"])
        return api_pb2.BlobCreateResponse(blob_ids=[blob], upload_urls=urls)

    async def BlobGet(self, request: api_pb2.BlobGetRequest) -> api_pb2.BlobGetResponse:
        return api_pb2.BlobGetResponse(download_url=f"{self.url}/blob/{request.blob_id}")

    async def MountBatchedCheckExistence(
        self, request: api_pb2.MountBatchedCheckExistenceRequest
    ) -> api_pb2.MountBatchedCheckExistenceResponse:
        missing = [sha for sha in request.sha256_hex_hashes if not self._file(sha).exists()]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: api_pb2.MountPutFileRequest) -> api_pb2.MountPutFileResponse:
        if request.WhichOneof("data_oneof") == "data_blob_id":
            data = (self._folder / "blobs" / request.data_blob_id).read_bytes()
            self._file(request.sha256_hex).write_bytes(data)
        elif request.WhichOneof("data_oneof") == "data":
            self._file(request.sha256_hex).write_bytes(request.data)
        return api_pb2.MountPutFileResponse(exists=self._file(request.sha256_hex).exists())

    async def MountGetOrCreate(self, request: api_pb2.MountGetOrCreateRequest) -> api_pb2.MountGetOrCreateResponse:
        mount = f"mo-{next(self._ids)}"
        # A mount asked for by name is Modal's own client, which the container has in its Python already.
        self._mounts[mount] = list(request.files)
        checksum = hashlib.sha256(mount.encode()).hexdigest()
        return api_pb2.MountGetOrCreateResponse(
            mount_id=mount, handle_metadata=api_pb2.MountHandleMetadata(content_checksum_sha256_hex=checksum)
        )

    # Containers

    def root_of(self, mounts: Iterable[str]) -> Path:
        """A folder with what the mounts put under /root, and nothing else."""
        key = hashlib.sha256(" ".join(sorted(mounts)).encode()).hexdigest()[:16]
        root = self._folder / "roots" / key
        if root.exists():
            return root
        root.mkdir()
        for mount in mounts:
            for file in self._mounts[mount]:
                path = PurePosixPath(file.filename)
                if path.is_relative_to(SOURCE_ROOT):
                    target = root / path.relative_to(SOURCE_ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(self._file(file.sha256_hex).read_bytes())
        return root

    def _file(self, sha256: str) -> Path:
        return self._folder / "files" / sha256
