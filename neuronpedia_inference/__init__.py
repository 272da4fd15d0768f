"""Interpretability inference: SAE features, top-k and steering for language models.

Importing this package does nothing. `load()` loads a model into this process, `connect(url)` and `modal(app)` ask one
elsewhere; all three give the same object (`neuronpedia_inference.client`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuronpedia_inference.client import (
        AsyncClient,
        Client,
        ControlVector,
        FeatureName,
        Result,
        Steering,
        Vector,
        async_connect,
        async_load,
        async_modal,
        connect,
        load,
        modal,
        read_corpus,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "ControlVector",
    "FeatureName",
    "Result",
    "Steering",
    "Vector",
    "async_connect",
    "async_load",
    "async_modal",
    "connect",
    "load",
    "modal",
    "read_corpus",
]


def __getattr__(name: str) -> Any:
    """The client's names, imported when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from neuronpedia_inference import client

    return getattr(client, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
