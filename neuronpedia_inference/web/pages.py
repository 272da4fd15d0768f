"""The page and the reference: files of the package, the same for every deployment and open to everyone.

They hold no secret and know none: what they show is asked for by the browser, with the key that is typed into them.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from threading import Lock

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from neuronpedia_inference.web.openapi import document
from neuronpedia_inference.web.sending import in_time

PIECE = 2**16
"""Bytes of a file that leave at once."""
_OWN = "default-src 'none'; script-src 'self'; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'"
PAGE_POLICY = (
    f"{_OWN}; style-src 'self'; img-src 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing inline, nothing from elsewhere, and no text that becomes HTML."""
REFERENCE_POLICY = f"{_OWN}; style-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
"""Swagger UI draws its arrows from data: addresses."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
PACKED = (".woff2",)
"""Compressed already."""


@dataclass(frozen=True)
class Content:
    """A file as it leaves."""

    plain: bytes
    packed: bytes | None
    """With gzip, where that is smaller."""
    tag: str


class Asset:
    """A file that is read, compressed and hashed once, by the first who asks."""

    def __init__(self, name: str, read: Callable[[], bytes], policy: str) -> None:
        self.suffix = name[name.rindex(".") :]
        self.policy = policy
        self._read = read
        self._lock = Lock()

    def content(self) -> Content:
        """Takes a tenth of a second the first time: for a thread."""
        with self._lock:
            return self._content

    @cached_property
    def _content(self) -> Content:
        plain = self._read()
        packed = plain if self.suffix in PACKED else gzip.compress(plain, compresslevel=6, mtime=0)
        return Content(plain, packed if len(packed) < len(plain) else None, f'"{sha256(plain).hexdigest()[:32]}"')


class AssetResponse(Response):
    """A file, piece by piece, no faster than it is read."""

    def __init__(self, asset: Asset, content: Content, request: Request, send_timeout_s: float) -> None:
        is_known = content.tag in request.headers.get("if-none-match", "")
        is_packed = content.packed is not None and "gzip" in request.headers.get("accept-encoding", "")
        body = (content.packed or b"") if is_packed else content.plain
        headers = {**HEADERS, "Content-Security-Policy": asset.policy, "ETag": content.tag}
        if not is_known:
            # Said in any case, so that the layer that compresses leaves it as it is.
            headers |= {"Content-Encoding": "gzip" if is_packed else "identity", "Content-Length": str(len(body))}
        super().__init__(None, 304 if is_known else 200, headers, TYPES[asset.suffix])
        self._pieces = body if not is_known and request.method != "HEAD" else b""
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = in_time(send, self._send_timeout_s)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self._pieces), PIECE):
            piece = self._pieces[start : start + PIECE]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def openapi_bytes() -> bytes:
    return json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()


def _in_folder(folder: str, policy: str) -> Iterator[tuple[str, Asset]]:
    """Every file there whose kind is served, by the path that it is served at."""
    for file in sorted((files("neuronpedia_inference.web") / folder).iterdir(), key=lambda one: one.name):
        if file.name[file.name.rfind(".") :] in TYPES:
            yield f"/{folder}/{file.name}", Asset(file.name, file.read_bytes, policy)


def _assets() -> dict[str, Asset]:
    found = dict(_in_folder("page", PAGE_POLICY)) | dict(_in_folder("reference", REFERENCE_POLICY))
    found["/"] = found.pop("/page/index.html")
    found["/docs"] = found["/redoc"] = found.pop("/reference/index.html")
    found["/openapi.json"] = Asset("openapi.json", openapi_bytes, REFERENCE_POLICY)
    return found


ASSETS = _assets()
"""By path. Nothing here depends on settings or on a model."""


def routes(send_timeout_s: float) -> list[BaseRoute]:
    def of(path: str, asset: Asset) -> BaseRoute:
        async def answer(request: Request) -> Response:
            content = await asyncio.to_thread(asset.content)
            return AssetResponse(asset, content, request, send_timeout_s)

        return Route(path, answer, methods=["GET"])

    return [of(path, asset) for path, asset in ASSETS.items()]
