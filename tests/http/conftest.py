"""One embedded model for the whole folder, behind one open server and one that asks for a secret."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from served import SECRET, Serve, Served, running, small_settings

from neuronpedia_inference.runtime import Runtime


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
