"""A server on some address, asked by httpx."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import httpx

from neuronpedia_inference.client.failures import failure
from neuronpedia_inference.client.transports import Answer, Body
from neuronpedia_inference.errors import InferenceError, InvalidRequest, Unavailable
from neuronpedia_inference.operations import by_name
from neuronpedia_inference.tensor_files import MEDIA_TYPE

Out = TypeVar("Out")

HEADER = "X-SECRET-KEY"
DATA = "data: "


class _Address:
    """Where the server is and what goes along, and the two ways to read its answers."""

    def __init__(self, url: str, key: str | None, timeout_s: float, patience_s: float) -> None:
        """patience_s: how long one question is asked again while the server is full or still loading."""
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"url: {url!r} begins neither with http:// nor with https://")
        self._url = url.rstrip("/")
        self._headers = {} if key is None else {HEADER.encode(): key.encode()}
        self._timeout_s = timeout_s
        self._patience_s = patience_s

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def _options(self) -> dict[str, Any]:
        return {"base_url": self._url, "headers": self._headers, "timeout": self._timeout_s}

    def _request(self, operation: str, body: Body) -> dict[str, Any]:
        wanted = by_name[operation]
        path, sent = wanted.address(body)
        return {"method": wanted.method, "url": path, "json": sent}

    def _tensor_request(self, operation: str, body: Body) -> dict[str, Any]:
        return {**self._request(operation, body), "headers": {"Accept": MEDIA_TYPE}}

    def _pause(self, exc: Unavailable, began: float) -> float:
        """Seconds until the question is asked again; raises the error where patience ends."""
        if time.monotonic() - began + exc.retry_after_s > self._patience_s:
            raise exc
        return exc.retry_after_s

    def _no_answer(self, exc: httpx.HTTPError | httpx.InvalidURL) -> Unavailable:
        return Unavailable(f"No answer from {self._url}: {exc or type(exc).__name__}")


def _read(response: httpx.Response) -> Answer:
    """Raises the error that the server has answered."""
    body = _json(response)
    if response.is_success and isinstance(body, dict):
        return body
    raise _failure(response)


def _content(response: httpx.Response) -> bytes:
    """As `_read`, of an answer that is no JSON."""
    if response.is_success:
        return response.content
    raise _failure(response)


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except ValueError:
        return None


def _failure(response: httpx.Response) -> InferenceError:
    body = _json(response)
    retry = response.headers.get("Retry-After", "")
    seconds = int(retry[:9]) if retry.isascii() and retry.isdecimal() else None
    request_id = response.headers.get("X-Request-Id", "")
    if isinstance(body, dict) and "error" in body:
        said, code = str(body["error"]), str(body.get("code", "internal"))
        return failure(code, said, str(body.get("request_id", request_id)), seconds)
    code = "unavailable" if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else "internal"
    said = f"The server answered {response.status_code} {response.reason_phrase}, not in its own words"
    return failure(code, said, request_id, seconds)


def _event(line: str) -> Answer | None:
    """Of a line of a stream; raises the error that an event tells."""
    if not line.startswith(DATA):
        return None
    event = json.loads(line.removeprefix(DATA))
    if "error" in event:
        raise failure(str(event.get("code", "internal")), str(event["error"]), str(event.get("request_id", "")))
    return event


class OverHttp(_Address):
    """For threads."""

    def __init__(self, url: str, key: str | None, timeout_s: float, patience_s: float) -> None:
        super().__init__(url, key, timeout_s, patience_s)
        self._client = httpx.Client(**self._options())

    def ask(self, operation: str, body: Body) -> Answer:
        return self._patiently(self._request(operation, body), _read)

    def ask_tensors(self, operation: str, body: Body) -> bytes:
        return self._patiently(self._tensor_request(operation, body), _content)

    def capabilities(self) -> Answer:
        return self._patiently({"method": "GET", "url": "/v1/capabilities"}, _read)

    def _patiently(self, request: dict[str, Any], read: Callable[[httpx.Response], Out]) -> Out:
        began = time.monotonic()
        while True:
            try:
                return read(self._client.request(**request))
            except Unavailable as exc:
                time.sleep(self._pause(exc, began))
            except (httpx.HTTPError, httpx.InvalidURL) as exc:
                raise self._no_answer(exc) from None

    def stream(self, operation: str, body: Body) -> Iterator[Answer]:
        request = self._request(operation, {**body, "stream": True})
        try:
            with self._client.stream(**request) as response:
                if not response.is_success:
                    response.read()
                    _read(response)
                for line in response.iter_lines():
                    if (event := _event(line)) is not None:
                        yield event
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise self._no_answer(exc) from None

    def close(self) -> None:
        self._client.close()


class AsyncOverHttp(_Address):
    """For coroutines."""

    def __init__(self, url: str, key: str | None, timeout_s: float, patience_s: float) -> None:
        super().__init__(url, key, timeout_s, patience_s)
        self._client = httpx.AsyncClient(**self._options())

    async def ask(self, operation: str, body: Body) -> Answer:
        return await self._patiently(self._request(operation, body), _read)

    async def ask_tensors(self, operation: str, body: Body) -> bytes:
        return await self._patiently(self._tensor_request(operation, body), _content)

    async def capabilities(self) -> Answer:
        return await self._patiently({"method": "GET", "url": "/v1/capabilities"}, _read)

    async def _patiently(self, request: dict[str, Any], read: Callable[[httpx.Response], Out]) -> Out:
        began = time.monotonic()
        while True:
            try:
                return read(await self._client.request(**request))
            except Unavailable as exc:
                await asyncio.sleep(self._pause(exc, began))
            except (httpx.HTTPError, httpx.InvalidURL) as exc:
                raise self._no_answer(exc) from None

    async def stream(self, operation: str, body: Body) -> AsyncIterator[Answer]:
        request = self._request(operation, {**body, "stream": True})
        try:
            async with self._client.stream(**request) as response:
                if not response.is_success:
                    await response.aread()
                    _read(response)
                async for line in response.aiter_lines():
                    if (event := _event(line)) is not None:
                        yield event
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise self._no_answer(exc) from None

    async def close(self) -> None:
        await self._client.aclose()
