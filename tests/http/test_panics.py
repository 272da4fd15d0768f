"""Failures that are no ordinary exceptions end their request in an answer, and nothing else."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from neuronpedia_inference.web.boundary import Boundary


class PanicException(BaseException):
    """As pyo3 makes it: a name, and no Exception."""


def raising(failure: BaseException) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise failure

    return Boundary(app)


def ask(app: ASGIApp) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/")

    return asyncio.run(asked())


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (PanicException("called `Result::unwrap()` on an `Err` value"), 500, "internal"),
        (MemoryError(), 503, "out_of_memory"),
    ],
)
def test_it_is_answered(failure: BaseException, status: int, code: str) -> None:
    answer = ask(raising(failure))
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "unwrap" not in answer.text


@pytest.mark.parametrize("end", [asyncio.CancelledError, GeneratorExit])
def test_what_ends_a_task_is_no_answer(end: type[BaseException]) -> None:
    with pytest.raises((end, asyncio.CancelledError)):
        ask(raising(end()))
