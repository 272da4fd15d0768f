"""One embedded model for the whole folder, behind one open server and one that asks for a secret."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from served import SECRET, Serve, Served, running, small_settings

from neuronpedia_inference.observability import PACKAGE
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings, variable


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that ran in this process logs to what was its standard error, which is closed behind it."""
    ours = logging.getLogger(PACKAGE)
    level = ours.level
    yield
    root = logging.getLogger()
    root.handlers = [one for one in root.handlers if one.get_name() != PACKAGE]
    ours.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting of the machine, and no `.env`, reaches the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for field in Settings.model_fields:
            if field == "local_sae_dir":
                continue
            patch.delenv(variable(field), raising=False)
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


@pytest.fixture(scope="session")
def runtime(clean_environment: None) -> Iterator[Runtime]:
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
