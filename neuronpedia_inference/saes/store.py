"""Which SAEs are in memory: least recently used leave first, and none leaves while it is being used."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Condition
from typing import Protocol

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import EngineFailed, Overloaded, StartupError, UnknownSource
from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.saes.encode import FeatureReader
from neuronpedia_inference.saes.load import load_sae


class Load(Protocol):
    def __call__(self, spec: SourceSpec, /, *, dtype: str, device: str) -> FeatureReader: ...


class SaeStore:
    """At most `max_loaded` SAEs in memory, loaded again when needed. Safe to use from several threads."""

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        *,
        dtype: str,
        device: str,
        max_loaded: int,
        load: Load = load_sae,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._dtype = dtype
        self._device = device
        self._max_loaded = max_loaded
        self._load = load
        self._sources: dict[str, Source] = {}
        # Least recently used first. None stands for an SAE that is being loaded: it takes a place.
        self._resident: OrderedDict[str, FeatureReader | None] = OrderedDict()
        self._leases: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._changed = Condition()

    def load_all(self, progress: Callable[[str], None] = lambda line: None) -> None:
        """Load every SAE once, to check it and learn its `Source`. Raises StartupError at a bad one."""
        for number, name in enumerate(self._specs, start=1):
            if name in self._sources:
                continue
            progress(f"SAE {number} of {len(self._specs)}: {name}")
            with self._changed:
                self._make_room()
                self._resident[name] = None
            self._fill(name, leases=0)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Sources that have been loaded once, in the order of the specs."""
        return tuple(self._sources[name] for name in self._specs if name in self._sources)

    def source(self, name: str) -> Source:
        """Raises UnknownSource with the nearest names."""
        if name not in self._sources:
            raise UnknownSource.named("source", name, self._sources)
        return self._sources[name]

    @contextmanager
    def lease(self, name: str) -> Iterator[FeatureReader]:
        """The reader of a source, kept in memory until the block ends.

        Raises UnknownSource; Overloaded if every place is leased; EngineFailed if it cannot be loaded again.
        """
        reader = self._acquire(name)
        try:
            yield reader
        finally:
            with self._changed:
                self._leases[name] -= 1
                self._changed.notify_all()

    def stats(self) -> dict[str, int]:
        with self._changed:
            return {
                "sources": len(self._specs),
                "max_loaded": self._max_loaded,
                "resident": len(self._resident),
                "leased": sum(1 for count in self._leases.values() if count),
                "hits": self._counts["hits"],
                "loads": self._counts["loads"],
                "evictions": self._counts["evictions"],
            }

    def _acquire(self, name: str) -> FeatureReader:
        self.source(name)
        with self._changed:
            # Another thread's load either arrives or is given up, and both are announced.
            self._changed.wait_for(lambda: not self._is_loading(name))
            reader = self._resident.get(name)
            if reader is not None:
                self._resident.move_to_end(name)
                self._leases[name] += 1
                self._counts["hits"] += 1
                return reader
            self._make_room()
            self._resident[name] = None
        return self._refill(name)

    def _refill(self, name: str) -> FeatureReader:
        try:
            return self._fill(name, leases=1)
        except StartupError as exc:
            raise EngineFailed(f"Source {name!r} could not be loaded again.") from exc

    def _fill(self, name: str, *, leases: int) -> FeatureReader:
        """Load into the place that is held for `name` and lease it, or give the place up."""
        with ExitStack() as on_failure:
            on_failure.callback(self._give_up, name)
            reader = self._load(self._specs[name], dtype=self._dtype, device=self._device)
            on_failure.pop_all()
        with self._changed:
            self._resident[name] = reader
            self._sources[name] = reader.source
            self._counts["loads"] += 1
            self._leases[name] += leases
            self._changed.notify_all()
        return reader

    def _give_up(self, name: str) -> None:
        with self._changed:
            del self._resident[name]
            self._changed.notify_all()

    def _is_loading(self, name: str) -> bool:
        return name in self._resident and self._resident[name] is None

    def _make_room(self) -> None:
        """Evict until one place is free; the lock is held. Raises Overloaded when all are leased."""
        while len(self._resident) >= self._max_loaded:
            idle = next((n for n, reader in self._resident.items() if reader is not None and not self._leases[n]), None)
            if idle is None:
                raise Overloaded(
                    f"All {self._max_loaded} places for SAEs are in use; try again, or raise MAX_LOADED_SAES."
                )
            del self._resident[idle]
            self._counts["evictions"] += 1
