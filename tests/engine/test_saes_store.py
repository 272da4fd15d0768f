"""Residency: never above the limit, never without a leased SAE, and always ending."""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import EngineFailed, Overloaded, StartupError, UnknownSource
from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.saes.encode import NeuronReader
from neuronpedia_inference.saes.store import SaeStore

NAMES = tuple(f"{layer}-res-t" for layer in range(6))
SPECS = tuple(SourceSpec(name, "res-t") for name in NAMES)


@dataclass
class Loader:
    """Stands in for `load_sae`: counts loads and fails on request."""

    loads: Counter[str] = field(default_factory=Counter)
    broken: set[str] = field(default_factory=set)
    gate: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)

    def __call__(self, spec: SourceSpec, /, *, dtype: str, device: str) -> NeuronReader:
        assert (dtype, device) == ("float32", "cpu")
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(5)
        if spec.name in self.broken:
            raise StartupError(f"SAE {spec.name!r}: broken")
        self.loads[spec.name] += 1
        return NeuronReader(Source(spec.name, spec.source_set, 0, "blocks.0.hook_resid_pre", 8, 4, "standard"))


def make(max_loaded: int, loader: Loader | None = None, *, loaded: bool = True) -> tuple[SaeStore, Loader]:
    loader = loader or Loader()
    store = SaeStore(SPECS, dtype="float32", device="cpu", max_loaded=max_loaded, load=loader)
    if loaded:
        store.load_all()
    return store, loader


def test_every_source_is_loaded_once_and_described_in_order() -> None:
    store, loader = make(2, loaded=False)
    lines: list[str] = []
    assert store.sources == ()
    store.load_all(lines.append)
    assert tuple(source.name for source in store.sources) == NAMES
    assert loader.loads == Counter(NAMES)
    assert lines[1] == "SAE 2 of 6: 1-res-t"
    assert len(lines) == 6
    assert store.stats() == {
        "sources": 6,
        "max_loaded": 2,
        "resident": 2,
        "leased": 0,
        "hits": 0,
        "loads": 6,
        "evictions": 4,
    }


def test_loading_all_twice_loads_once() -> None:
    store, loader = make(2)
    store.load_all()
    assert loader.loads == Counter(NAMES)


def test_the_last_loaded_stay() -> None:
    store, loader = make(2)
    for name in NAMES[-2:]:
        with store.lease(name) as reader:
            assert reader.source is store.source(name)
    assert store.stats()["hits"] == 2
    assert loader.loads == Counter(NAMES)


def test_the_least_recently_used_leaves() -> None:
    store, loader = make(2)
    with store.lease("4-res-t"):
        pass
    with store.lease("0-res-t"):  # 5 leaves, for 4 was used after it
        pass
    with store.lease("4-res-t"):
        pass
    assert loader.loads["4-res-t"] == 1
    with store.lease("5-res-t"):
        pass
    assert loader.loads["5-res-t"] == 2


def test_a_leased_one_stays_whatever_comes() -> None:
    store, loader = make(2)
    with store.lease("0-res-t") as first:
        for name in NAMES * 2:
            with store.lease(name):
                assert store.stats()["resident"] <= 2
        with store.lease("0-res-t") as again:
            assert again is first
    assert loader.loads["0-res-t"] == 2


def test_more_leases_than_places_is_an_error_at_once() -> None:
    store, loader = make(2)
    with store.lease("0-res-t"), store.lease("1-res-t"):
        with pytest.raises(Overloaded, match="All 2 places for SAEs.*MAX_LOADED_SAES"), store.lease("2-res-t"):
            pass
        assert store.stats()["leased"] == 2
    with store.lease("2-res-t"):
        assert loader.loads["2-res-t"] == 2


def test_unknown_names_are_refused_with_the_nearest() -> None:
    store, _ = make(2)
    for ask in (store.source, lambda name: store.lease(name).__enter__()):
        with pytest.raises(UnknownSource, match="'9-res-t'.*Did you mean"):
            ask("9-res-t")


def test_a_bad_sae_stops_the_start() -> None:
    store, _ = make(2, Loader(broken={"3-res-t"}), loaded=False)
    with pytest.raises(StartupError, match="3-res-t"):
        store.load_all()
    assert [source.name for source in store.sources] == ["0-res-t", "1-res-t", "2-res-t"]
    assert store.stats()["resident"] == 1  # the place of the bad one is free again


def test_a_failed_reload_frees_its_place_and_can_be_tried_again() -> None:
    store, loader = make(1)
    loader.broken.add("0-res-t")
    with pytest.raises(EngineFailed, match="'0-res-t' could not be loaded again"), store.lease("0-res-t"):
        pass
    assert store.stats()["leased"] == store.stats()["resident"] == 0
    loader.broken.clear()
    with store.lease("0-res-t") as reader:
        assert reader.source.name == "0-res-t"


def test_an_error_inside_a_lease_ends_it() -> None:
    store, _ = make(1)
    with pytest.raises(ZeroDivisionError), store.lease("0-res-t"):
        raise ZeroDivisionError
    assert store.stats()["leased"] == 0


def test_two_threads_share_one_load() -> None:
    store, loader = make(2)
    loader.gate = threading.Event()
    loader.entered.clear()
    readers: list[object] = []

    def use() -> None:
        with store.lease("0-res-t") as reader:
            readers.append(reader)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert loader.entered.wait(5)
    with store.lease("5-res-t"):  # a hit does not wait for somebody else's load
        pass
    loader.gate.set()
    for thread in threads:
        thread.join(5)
    assert len(readers) == 4
    assert len({id(reader) for reader in readers}) == 1
    assert loader.loads["0-res-t"] == 2


def test_waiters_try_for_themselves_after_a_failed_load() -> None:
    store, loader = make(2)
    loader.broken.add("0-res-t")
    loader.gate = threading.Event()
    failures: list[EngineFailed] = []

    def use() -> None:
        try:
            with store.lease("0-res-t"):
                pass
        except EngineFailed as exc:
            failures.append(exc)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    loader.gate.set()
    for thread in threads:
        thread.join(5)
    assert len(failures) == 3
    assert store.stats()["leased"] == 0


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), max_size=40))
def test_any_order_of_leases_keeps_the_rules(max_loaded: int, steps: list[tuple[str, bool]]) -> None:
    """Open or close leases in any order; compare with a model of what must be resident."""
    store, loader = make(max_loaded)
    held: dict[str, list[tuple[ExitStack, object]]] = {}
    for name, opens in steps:
        if opens:
            stack = ExitStack()
            full = len(held) >= max_loaded and name not in held
            if full:
                with pytest.raises(Overloaded):
                    stack.enter_context(store.lease(name))
            else:
                loads = loader.loads[name]
                reader = stack.enter_context(store.lease(name))
                if name in held:
                    assert reader is held[name][0][1]
                    assert loader.loads[name] == loads
                held.setdefault(name, []).append((stack, reader))
        elif name in held:
            held[name].pop()[0].close()
            if not held[name]:
                del held[name]
        stats = store.stats()
        assert stats["leased"] == len(held) <= stats["resident"] <= max_loaded
        assert stats["loads"] - stats["evictions"] == stats["resident"]


def test_many_threads_stay_within_the_limit() -> None:
    store, _ = make(3)
    problems: list[str] = []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(150):
            name = chosen.choice(NAMES)
            with store.lease(name) as reader:
                if reader.source.name != name or store.stats()["resident"] > 3:
                    problems.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    assert store.stats()["leased"] == 0
