"""Single features, read from files by threads of their own, and kept for those who ask again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Protocol

from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.recent import Recent
from neuronpedia_inference.saes.residency import FreeLease

KEPT_BYTES = 2**26
"""Of single features: some thousands of them."""
_THREADS = 4


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


class Slices:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="sae-slices")
        self._lock = Lock()
        self._kept: Recent[Hashable, _Sized] = Recent(KEPT_BYTES, lambda kept: kept.nbytes)
        self.n_read = 0
        """From files, so far."""

    def request(self, key: tuple[str, int, str], read: Callable[[int], _Sized]) -> Future[FreeLease]:
        """What `read` gives for a feature, at once if it is kept. Never waits; the future may get EngineFailed.

        key: source, index of the feature, and what of it is read.
        """
        with self._lock:
            kept = self._kept.get(key)
        if kept is None:
            return self._readers.submit(self._read, key, read)
        found: Future[FreeLease] = Future()
        found.set_result(FreeLease(kept))
        return found

    def close(self) -> None:
        """Nothing may be asked for afterwards."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _read(self, key: tuple[str, int, str], read: Callable[[int], _Sized]) -> FreeLease:
        source, index, _ = key
        try:
            found = read(index)
        except OSError as exc:
            raise EngineFailed(
                f"Feature {index} of source {source!r} could not be read; the server's log says why."
            ) from exc
        with self._lock:
            self.n_read += 1
            self._kept.put(key, lambda: found, found.nbytes)
        return FreeLease(found)
