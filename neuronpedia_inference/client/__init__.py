"""The service as Python objects: over HTTP, on Modal, or in this process, with the same methods and the same answers.

    import neuronpedia_inference as ni

    m = ni.load()                                   # or ni.connect(url, key), or ni.modal("app")
    moon = m.search("moon orbit")[0]
    print(m.steer("The most important thing is", moon @ 60).steered.text)

Importing it imports neither torch nor modal; `load` brings the one, `modal` the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuronpedia_inference.client.captures import Captured
from neuronpedia_inference.client.control_vectors import ControlVector
from neuronpedia_inference.client.corpus import read_corpus
from neuronpedia_inference.client.lens_grid import LensGrid
from neuronpedia_inference.client.results import (
    ActiveFeature,
    Contrast,
    Feature,
    Features,
    FoundFeature,
    Result,
    SearchResults,
    TopFeatures,
)
from neuronpedia_inference.client.session import AsyncChat, AsyncClient, Chat, Client
from neuronpedia_inference.client.steering import FeatureName, Steering, Vector, When
from neuronpedia_inference.client.swept import Scores, Sweep
from neuronpedia_inference.client.written import Steered

__all__ = [
    "ActiveFeature",
    "AsyncChat",
    "AsyncClient",
    "Captured",
    "Chat",
    "Client",
    "Contrast",
    "ControlVector",
    "Feature",
    "FeatureName",
    "Features",
    "FoundFeature",
    "LensGrid",
    "Result",
    "Scores",
    "SearchResults",
    "Steered",
    "Steering",
    "Sweep",
    "TopFeatures",
    "Vector",
    "When",
    "async_connect",
    "async_load",
    "async_modal",
    "connect",
    "load",
    "modal",
    "read_corpus",
]

TIMEOUT_S = 600.0
PATIENCE_S = 60.0


def connect(
    url: str, key: str | None = None, *, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S
) -> Client:
    """A server. key: its secret. patience_s: how long a question is asked again while the server is full or loading.

    Nothing is sent yet.
    """
    from neuronpedia_inference.client.over_http import OverHttp

    return Client(OverHttp(url, key, timeout_s, patience_s))


def async_connect(
    url: str, key: str | None = None, *, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S
) -> AsyncClient:
    """As `connect`, for coroutines."""
    from neuronpedia_inference.client.over_http import AsyncOverHttp

    return AsyncClient(AsyncOverHttp(url, key, timeout_s, patience_s))


def modal(app: str = "neuronpedia-inference") -> Client:
    """A deployed app, by its name. Needs the package `modal` and a token of the workspace."""
    from neuronpedia_inference.client.on_modal import OnModal

    return Client(OnModal(app))


def async_modal(app: str = "neuronpedia-inference") -> AsyncClient:
    """As `modal`, for coroutines."""
    from neuronpedia_inference.client.on_modal import AsyncOnModal

    return AsyncClient(AsyncOnModal(app))


def load(say: Callable[[str], None] = lambda _: None, **settings: Any) -> Client:
    """A model in this process; without settings the embedded one. settings: as the environment's, in small letters.

    Takes seconds, which `say` is told about. Raises StartupError.
    """
    from neuronpedia_inference.client.in_process import InProcess, start
    from neuronpedia_inference.settings import Settings

    return Client(InProcess(start(Settings.read(**settings), say)))


async def async_load(say: Callable[[str], None] = lambda _: None, **settings: Any) -> AsyncClient:
    """As `load`, for coroutines: others run while it loads."""
    import asyncio

    from neuronpedia_inference.client.in_process import AsyncInProcess, start
    from neuronpedia_inference.settings import Settings

    return AsyncClient(AsyncInProcess(await asyncio.to_thread(start, Settings.read(**settings), say)))
