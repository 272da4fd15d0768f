"""SAEs in the host's memory, from which they are copied to a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Condition

from neuronpedia_inference.saes.describe import Described
from neuronpedia_inference.saes.encode import FeatureReader
from neuronpedia_inference.saes.load import Load, pin
from neuronpedia_inference.saes.residency import Residency
from neuronpedia_inference.saes.specs import SourceSpec


class Masters:
    """At most so many, and so many bytes, the least recently used out first. Any thread may fetch, each another SAE."""

    def __init__(self, load: Load, *, pinned: bool, max_count: int, max_bytes: int | None) -> None:
        self._load = load
        self._pinned = pinned
        self._residency = Residency(max_count, max_bytes)
        self._kept: dict[str, FeatureReader] = {}
        self._changed = Condition()
        self.n_loads = 0
        """From disk, so far."""
        self.peak_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def n_bytes(self) -> int:
        return self._residency.n_bytes

    @contextmanager
    def fetched(self, spec: SourceSpec, about: Described) -> Iterator[FeatureReader]:
        """The master, read from disk where it is not here; it stays until the block ends.

        Waits where all that have room are in use. Raises what `load` raises.
        """
        name = spec.name
        gone = self._let_in(name, about.n_bytes)
        try:
            self._free(name, about.n_bytes, gone)
            yield self._kept.get(name) or self._read(spec, about)
        finally:
            with self._changed:
                self._residency.release(name, self)
                if name not in self._kept:  # its load has failed
                    self._residency.remove(name)
                self._changed.notify_all()

    def _let_in(self, name: str, n_bytes: int) -> list[FeatureReader]:
        """A lease, once there is room. What is returned is to be freed."""
        with self._changed:
            leaving: list[str] | None = []
            while name not in self._residency and (leaving := self._residency.leaving_for(n_bytes)) is None:
                self._changed.wait()
            left_bytes = self.n_bytes
            for other in leaving or []:
                self._residency.remove(other)
            if name not in self._residency:
                self._residency.add(name, max(n_bytes, left_bytes - self.n_bytes))
            self._residency.lease(name, self)
            self.peak_bytes = max(self.peak_bytes, self.n_bytes)
            return [self._kept.pop(other) for other in leaving or []]

    def _free(self, name: str, n_bytes: int, gone: Sequence[FeatureReader]) -> None:
        for reader in gone:
            reader.free()
        with self._changed:
            self._residency.shrink(name, n_bytes)
            self._changed.notify_all()

    def _read(self, spec: SourceSpec, about: Described) -> FeatureReader:
        master = self._load(spec, dtype=about.dtype, device="cpu")
        if self._pinned:
            pin(master)
        with self._changed:
            self.n_loads += 1
            self._kept[spec.name] = master
        return master
