"""40 SAEs, a host budget for 10, one for 4 on the device: all answer, neither is exceeded, nobody waits for another."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.encode import FeatureReader, LoadedSae
from neuronpedia_inference.saes.load import load_sae, place_on_device
from neuronpedia_inference.saes.store import SaeStore
from tests.engine.stores import SOON
from tests.engine.test_saes_residency import activations, written

N_SAES, ON_HOST, ON_DEVICE = 40, 10, 4


@dataclass
class Counted:
    """Bytes of what has been made and not freed, whatever the store says."""

    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, reader: LoadedSae) -> LoadedSae:
        n_bytes, free = reader.n_bytes, reader.free
        self.add(n_bytes)

        def freed() -> None:
            self.add(-n_bytes)
            free()

        reader.free = freed  # type: ignore[method-assign]
        return reader

    def add(self, n_bytes: int) -> None:
        with self.lock:
            self.now += n_bytes
            self.most = max(self.most, self.now)


@dataclass
class Shop:
    store: SaeStore
    specs: list[SourceSpec]
    answers: dict[str, Tensor]
    host: Counted
    device: Counted
    gates: dict[str, threading.Event] = field(default_factory=dict)

    def all(self, name: str) -> None:
        with self.store.lease(name) as reader:
            close(reader.encode(activations()), self.answers[name])

    def one(self, name: str, index: int = 3) -> None:
        with self.store.feature(name, index).result(SOON) as feature:
            if feature.source.is_read_by_column:
                close(feature.encode(activations()), self.answers[name][:, index])

    def row(self, name: str, index: int = 3) -> None:
        with self.store.decoder_row(name, index).result(SOON) as row:
            assert row.norm() > 0


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[SourceSpec], dict[str, Tensor]]:
    return written(tmp_path_factory.mktemp("saes"), N_SAES)


@pytest.fixture(params=["cpu", "elsewhere"])
def shop(on_disk: tuple[list[SourceSpec], dict[str, Tensor]], request: pytest.FixtureRequest) -> Iterator[Shop]:
    specs, answers = on_disk
    largest = max(describe(spec, "float32").n_bytes for spec in specs)
    host, device = Counted(), Counted()

    def load(spec: SourceSpec, /, *, dtype: str, device: str) -> LoadedSae:
        if spec.name in made.gates:
            assert made.gates[spec.name].wait(SOON)
        return host.watch(load_sae(spec, dtype=dtype, device=device))

    def place(master: FeatureReader, where: str, /) -> FeatureReader:
        copied: Any = place_on_device(master, "cpu")
        return device.watch(copied)

    store = SaeStore(
        specs,
        dtype="float32",
        device=request.param,
        max_loaded=N_SAES,
        host_bytes=ON_HOST * largest,
        budget_bytes=ON_DEVICE * largest,
        load=load,
        place=place,
    )
    store.describe_all()
    made = Shop(store, specs, answers, host, device)
    yield made
    assert host.most <= ON_HOST * largest
    assert device.most <= ON_DEVICE * largest
    stats = store.stats()
    assert stats["peak_bytes"] <= stats["budget_bytes"] == ON_DEVICE * largest
    assert stats["host_peak_bytes"] <= stats["host_budget_bytes"] == ON_HOST * largest
    assert stats["leased"] == 0
    assert (host.most if request.param == "cpu" else device.most) <= stats["peak_bytes"]
    store.close()


def in_order(shop: Shop) -> None:
    for name in shop.answers:
        shop.all(name)
    assert shop.store.stats()["resident"] >= ON_DEVICE


def again_and_again(shop: Shop) -> None:
    chosen = random.Random(3)
    for name in chosen.choices(sorted(shop.answers), k=3 * N_SAES):
        chosen.choice((shop.all, shop.one, shop.row))(name)


def all_at_once(shop: Shop) -> None:
    with ThreadPoolExecutor(16) as callers:
        asked = [callers.submit(ask, name) for name in shop.answers for ask in (shop.all, shop.one, shop.all)]
        for one in asked:
            one.result(SOON)


def features_alone(shop: Shop) -> None:
    for name in shop.answers:
        shop.one(name, 5)
        shop.row(name, 6)
    assert shop.store.stats()["loads"] == 0
    assert shop.host.most == 0


def beside_three_that_load_slowly(shop: Shop) -> None:
    """Features of those three, and everything of the others, are answered meanwhile."""
    slow = list(shop.answers)[:3]
    shop.gates.update({name: threading.Event() for name in slow})
    waiting: list[Future[Any]] = [shop.store.request(name) for name in slow]
    for name in shop.answers:
        shop.one(name)
        if name not in slow:
            shop.all(name)
    assert not any(future.done() for future in waiting)
    for gate in shop.gates.values():
        gate.set()
    for future in waiting:
        future.result(SOON).release()


CASES: list[Callable[[Shop], None]] = [
    in_order,
    again_and_again,
    all_at_once,
    features_alone,
    beside_three_that_load_slowly,
]


@pytest.mark.parametrize("case", CASES)
def test_all_answer_within_both_budgets(case: Callable[[Shop], None], shop: Shop) -> None:
    case(shop)
