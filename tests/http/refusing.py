"""Lens requests that are refused for what the server is, or does."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest
from served import MODEL, TEXT, Serve, small_settings, until

from neuronpedia_inference.lenses.jacobians import Jacobians
from neuronpedia_inference.runtime import Runtime

LENS: dict[str, Any] = {"model": MODEL, "type": ["LOGIT_LENS"], "prompt": TEXT, "layers": [3]}


def no_jacobians(runtime: Runtime, serve: Serve) -> httpx.Response:
    """Of a server whose model has none."""
    bare = Jacobians(off_because="nobody has fitted any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.watches, "_jacobians", bare)
        with serve(small_settings(), lambda: runtime).client() as client:
            return client.post("/v1/lens/prompt", json={**LENS, "type": ["JACOBIAN_LENS"]})


def busy(runtime: Runtime, serve: Serve) -> httpx.Response:
    """Of a server whose worker has something to do and somebody who waits."""
    go = threading.Event()

    async def both() -> None:
        await asyncio.gather(runtime.with_model(lambda _: go.wait(60)), runtime.forget())

    thread = threading.Thread(target=lambda: asyncio.run(both()))
    thread.start()
    try:
        until(lambda: runtime.describe()["waiting"] > 0)
        with serve(small_settings(), lambda: runtime).client() as client:
            return client.post("/v1/lens/prompt", json={**LENS, "fail_if_busy": True})
    finally:
        go.set()
        thread.join()
