"""One embedded model for the whole folder, behind one open server and one that asks for a secret."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx
import pytest
from served import SECRET, Serve, Served, running, small_settings

from neuronpedia_inference.runtime import Runtime

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.http.browser import Visit


@pytest.fixture(scope="session")
def runtime(empty_folder: None) -> Iterator[Runtime]:
    with warnings.catch_warnings():
        # The model libraries warn about themselves while they are imported.
        warnings.simplefilter("ignore")
        loaded = Runtime.load(small_settings())
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def server(runtime: Runtime) -> Iterator[Served]:
    with running(small_settings(), lambda: runtime) as served:
        yield served


@pytest.fixture(scope="session")
def locked_server(runtime: Runtime) -> Iterator[Served]:
    with running(small_settings(secret=SECRET), lambda: runtime) as served:
        yield served


@pytest.fixture(scope="session")
def http(server: Served) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server of one's own; it ends with the test."""
    with ExitStack() as stack:
        yield lambda settings, get_runtime: stack.enter_context(running(settings, get_runtime))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Of one module, because its driver keeps an event loop running in this thread."""
    from tests.http.browser import browser

    with browser() as opened:
        yield opened


@pytest.fixture
def visit(chromium: Browser, server: Served) -> Iterator[Visit]:
    from tests.http.browser import visiting

    with visiting(chromium, server.url) as opened:
        yield opened
