"""What a process must be when its memory is kept: everything imported, nothing open, no weights mapped from files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from neuronpedia_inference.loading import HostWeights, Loaded


@contextmanager
def without_cuda() -> Iterator[None]:
    """Whoever asks torch for CUDA inside is told that there is none, and the driver is not asked.

    It would remember that it saw no GPU, and a restored process has one.
    """
    import torch

    asked = torch.cuda.is_available, torch.cuda.device_count
    torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
    try:
        yield
    finally:
        torch.cuda.is_available, torch.cuda.device_count = asked


def import_everything() -> None:
    """All that a request will need: seconds, of which none is left after a restore."""
    import tqdm

    for name in (
        "sae_lens",
        "neuronpedia_inference.runtime",
        "neuronpedia_inference.web.app",
        "neuronpedia_inference.checks",
    ):
        import_module(name)
    tqdm.tqdm.monitor_interval = 0  # no thread that watches progress bars


def found_out() -> frozenset[tuple[str, int]]:
    """What earlier starts have measured and kept: names of files in the cache folder, and when they were written."""
    from neuronpedia_inference.embedded.weights import default_cache_dir

    found: set[tuple[str, int]] = set()
    with suppress(OSError):  # another container may put a file in another's place meanwhile
        found.update((file.name, file.stat().st_mtime_ns) for file in default_cache_dir().glob("*.json"))
    return frozenset(found)


def own_weights(host: HostWeights) -> HostWeights:
    """The same, with weights in memory of their own: a file on the volume may be another after a restore."""
    if host.model is not None:
        _own(host.model)
    return host


def own_saes(loaded: Loaded) -> Loaded:
    """The same for as many SAEs as have room in host memory, which the first requests find there."""
    loaded.store.fill()
    for reader in loaded.store.readers:
        module = getattr(reader, "module", None)
        if module is not None:
            _own(module)
    return loaded


def close_connections() -> None:
    """The hub's client keeps some open for the next request."""
    from huggingface_hub.utils import close_session

    close_session()


def _own(module: nn.Module) -> None:
    for weights in (*module.parameters(), *module.buffers()):
        weights.data = weights.data.clone()
