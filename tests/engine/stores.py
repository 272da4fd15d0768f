"""Stores of stand-ins for SAEs that know their size, and count for themselves what is in memory."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import OutOfMemory
from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.saes.describe import Described
from neuronpedia_inference.saes.encode import FeatureReader, NeuronReader
from neuronpedia_inference.saes.store import Lease, SaeStore

NAMES = tuple(f"{layer}-res-t" for layer in range(6))
SPECS = tuple(SourceSpec(name, "res-t") for name in NAMES)
SOON = 300.0
"""Seconds after which something that must happen has not."""


class Sized(NeuronReader):
    """Stands in for an SAE of a known size; `memory` knows the bytes of all that have not been freed."""

    def __init__(self, source: Source, n_bytes: int, memory: Memory) -> None:
        super().__init__(source)
        self.n_bytes = n_bytes
        self._memory = memory
        memory.take(self)

    def free(self) -> None:
        self._memory.give_back(self)


@dataclass
class Memory:
    """Counts for itself what is in it, whatever the store says."""

    inside: list[Sized] = field(default_factory=list)
    most: int = 0
    leased: list[FeatureReader] = field(default_factory=list)
    lost: list[FeatureReader] = field(default_factory=list)
    """Freed while leased."""

    @property
    def n_bytes(self) -> int:
        return sum(reader.n_bytes for reader in list(self.inside))

    def take(self, reader: Sized) -> None:
        self.inside.append(reader)
        self.most = max(self.most, self.n_bytes)

    def give_back(self, reader: Sized) -> None:
        self.inside.remove(reader)
        if reader in self.leased:
            self.lost.append(reader)


@dataclass
class Loader:
    """Stands in for `load_sae`: counts loads, and stops or fails on request."""

    sizes: dict[str, int] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    loads: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Exception] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    entered: dict[str, threading.Event] = field(default_factory=dict)

    def __call__(self, spec: SourceSpec, /, *, dtype: str, device: str) -> Sized:
        assert (dtype, device) == ("float32", "cpu")
        if spec.name in self.gates:
            self.entered[spec.name].set()
            assert self.gates[spec.name].wait(SOON)
        if spec.name in self.broken:
            raise self.broken[spec.name]
        self.loads[spec.name] += 1
        return Sized(_source(spec), self.sizes.get(spec.name, 1), self.memory)

    def describe(self, spec: SourceSpec, dtype: str, /) -> Described:
        """Stands in for `describe`: sizes as they are now."""
        return _OfSize(_source(spec), None, dtype, None, size=self.sizes.get(spec.name, 1))

    def stop_at(self, name: str) -> threading.Event:
        """The load of `name` waits until the event is set; `entered[name]` says that it has begun."""
        self.entered[name] = threading.Event()
        self.gates[name] = threading.Event()
        return self.gates[name]


@dataclass(frozen=True)
class _OfSize(Described):
    size: int = 1

    @property
    def n_bytes(self) -> int:
        return self.size


def _source(spec: SourceSpec) -> Source:
    return Source(spec.name, spec.source_set, 0, "blocks.0.hook_resid_pre", 8, 4, "standard")


@dataclass
class Device:
    """Stands in for `place_on_device`."""

    memory: Memory = field(default_factory=Memory)
    broken: set[str] = field(default_factory=set)

    def __call__(self, master: FeatureReader, device: str, /) -> Sized:
        assert device == "elsewhere"
        if master.source.name in self.broken:
            raise OutOfMemory(f"no room for {master.source.name}")
        return Sized(master.source, master.n_bytes, self.memory)


def make(
    max_loaded: int = 100, loader: Loader | None = None, *, budget: int | None = None, used: bool = True
) -> tuple[SaeStore, Loader]:
    """used: each once, in order."""
    loader = loader or Loader()
    store = SaeStore(
        SPECS,
        dtype="float32",
        device="cpu",
        max_loaded=max_loaded,
        budget_bytes=budget,
        describe=loader.describe,
        load=loader,
    )
    store.describe_all()
    touch(store, *NAMES if used else ())
    return store, loader


def two_tiers(max_loaded: int, budget: int, host: int | None = None, **sizes: int) -> tuple[SaeStore, Loader, Device]:
    """Each has been used once, in order."""
    loader, device = Loader({f"{key[1:]}-res-t": size for key, size in sizes.items()}), Device()
    store = SaeStore(
        SPECS,
        dtype="float32",
        device="elsewhere",
        max_loaded=max_loaded,
        host_bytes=host,
        budget_bytes=budget,
        describe=loader.describe,
        load=loader,
        place=device,
    )
    store.describe_all()
    touch(store, *NAMES)
    return store, loader, device


def touch(store: SaeStore, *names: str) -> None:
    for name in names:
        with store.lease(name) as reader:
            assert reader.source == store.source(name)


def got(future: Future[Lease]) -> Lease:
    return future.result(SOON)
