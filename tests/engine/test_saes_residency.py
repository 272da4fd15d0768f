"""Any order of requests keeps the rules: never above the bounds, never without a leased SAE, every request ends."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.encode import FeatureReader, LoadedSae
from neuronpedia_inference.saes.kinds import SERVED
from neuronpedia_inference.saes.load import load_sae, pin, place_on_device
from neuronpedia_inference.saes.residency import PATIENCE, Residency
from neuronpedia_inference.saes.store import Lease, SaeStore
from tests.engine.stores import NAMES, SOON, SPECS, Device, Loader, Memory, got, make, touch, two_tiers

# Any order


@dataclass
class Program:
    """Runs random requests, releases and cancellations, and looks after each that the rules hold."""

    store: SaeStore
    memory: Memory
    budget: int
    pending: list[Future[Lease]] = field(default_factory=list)
    held: list[Lease] = field(default_factory=list)

    def request(self, number: int) -> None:
        self.pending.append(self.store.request(NAMES[number % len(NAMES)]))

    def release(self, number: int) -> None:
        self.collect()
        if self.held:
            lease = self.held.pop(number % len(self.held))
            self.memory.leased.remove(lease.reader)
            lease.release()
            lease.release()

    def cancel(self, number: int) -> None:
        if self.pending and self.pending[number % len(self.pending)].cancel():
            del self.pending[number % len(self.pending)]

    def collect(self) -> None:
        for future in [future for future in self.pending if future.done()]:
            self.pending.remove(future)
            self.held.append(got(future))
            self.memory.leased.append(self.held[-1].reader)

    def check(self) -> None:
        self.collect()
        stats = self.store.stats()
        assert stats["resident_bytes"] <= stats["peak_bytes"] <= self.budget
        assert self.memory.most <= self.budget
        assert self.memory.lost == []
        for lease in self.held:
            assert lease.reader in self.memory.inside

    def finish(self) -> None:
        """Everything requested ends once those who hold let go; then all is accounted for."""
        while self.pending or self.held:
            while self.held:
                self.release(0)
            if self.pending:
                assert wait(self.pending, SOON, FIRST_COMPLETED).done
            self.check()
        touch(self.store, *NAMES)  # a load that nobody wants any more may be under way
        self.check()
        stats = self.store.stats()
        assert stats["leased"] == 0
        assert stats["resident_bytes"] == self.memory.n_bytes


STEPS = st.lists(
    st.tuples(st.sampled_from(["request", "request", "release", "cancel"]), st.integers(0, 99)), max_size=60
)
SIZES = st.lists(st.integers(0, 9), min_size=len(NAMES), max_size=len(NAMES))


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(0, 20), st.integers(1, 6), STEPS)
def test_any_order_of_requests_keeps_the_rules(
    sizes: list[int], spare: int, max_loaded: int, steps: list[tuple[str, int]]
) -> None:
    budget = max(sizes) + spare
    store, loader = make(max_loaded, Loader(dict(zip(NAMES, sizes, strict=True))), budget=budget)
    program = Program(store, loader.memory, budget)
    for step, number in steps:
        getattr(program, step)(number)
        program.check()
        assert store.stats()["resident"] <= max_loaded
    program.finish()
    assert store.stats()["loads"] - store.stats()["evictions"] == store.stats()["resident"]


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(0, 20), st.integers(1, 6), STEPS)
def test_any_order_on_two_tiers_keeps_the_rules(
    sizes: list[int], spare: int, max_loaded: int, steps: list[tuple[str, int]]
) -> None:
    budget = max(sizes) + spare
    store, loader, device = two_tiers(max_loaded, budget, **{f"_{layer}": size for layer, size in enumerate(sizes)})
    program = Program(store, device.memory, budget)
    for step, number in steps:
        getattr(program, step)(number)
        program.check()
        assert store.stats()["host"] <= max_loaded
    program.finish()
    stats = store.stats()
    assert stats["uploads"] - stats["evictions"] == stats["resident"]
    assert len(loader.memory.inside) == stats["host"]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(9, 25),
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.booleans()), max_size=60),
)
def test_who_must_leave(max_count: int, max_bytes: int, steps: list[tuple[str, int, bool]]) -> None:
    """Against a list kept here: least recently used first, no one leased, no one in vain."""
    residency = Residency(max_count, max_bytes)
    order: list[str] = []
    sizes: dict[str, int] = {}
    leased: set[str] = set()
    for name, n_bytes, keep in steps:
        if name in leased:
            assert residency.release(name, name)
            assert not residency.release(name, name)
            leased.remove(name)
            continue
        if name not in order:
            leaving = residency.leaving_for(n_bytes)
            idle = [other for other in order if other not in leased]
            rests = [[other for other in order if other not in idle[:n]] for n in range(len(idle) + 1)]
            enough = [
                n
                for n, rest in enumerate(rests)
                if len(rest) < max_count and sum(sizes[other] for other in rest) + n_bytes <= max_bytes
            ]
            assert leaving == (idle[: enough[0]] if enough else None)
            assert residency.next_of([(name, n_bytes)]) == (None if leaving is None else (name, leaving))
            if leaving is None:
                continue
            for other in leaving:
                residency.remove(other)
                order.remove(other)
            residency.add(name, n_bytes)
            sizes[name] = n_bytes
            order.append(name)
        if keep:
            residency.lease(name, name)
            leased.add(name)
            order.remove(name)
            order.append(name)
        assert (len(residency), residency.n_leased) == (len(order), len(leased))
        assert residency.n_bytes == sum(sizes[other] for other in order) <= max_bytes


def full(max_bytes: int, **leased: int) -> Residency:
    residency = Residency(None, max_bytes)
    for name, n_bytes in leased.items():
        residency.add(name, n_bytes)
        residency.lease(name, name)
    return residency


def let_in(residency: Residency, queue: list[tuple[str, int]]) -> str | None:
    """The next of the queue, with a lease."""
    chosen = residency.next_of(queue)
    if chosen is None:
        return None
    for name in chosen[1]:
        residency.remove(name)
    residency.add(chosen[0], dict(queue)[chosen[0]])
    residency.lease(chosen[0], chosen[0])
    return chosen[0]


class TestOvertaking:
    def test_the_oldest_that_fits_beside_the_first_goes_before_it(self) -> None:
        residency = full(10, old=8)
        assert let_in(residency, [("first", 9), ("two", 2), ("one", 1), ("other", 1)]) == "one"

    def test_those_who_came_in_meanwhile_count_together(self) -> None:
        residency = full(10, old=6)
        assert let_in(residency, [("first", 7), ("a", 2), ("b", 2), ("c", 1)]) == "a"
        assert let_in(residency, [("first", 7), ("b", 2), ("c", 1)]) == "c"
        assert let_in(residency, [("first", 7), ("b", 2), ("d", 1)]) is None
        residency.release("old", "old")
        assert let_in(residency, [("first", 7), ("b", 2), ("d", 1)]) == "first"

    def test_those_who_are_done_do_not_count(self) -> None:
        residency = full(10, old=6)
        assert let_in(residency, [("first", 7), ("a", 3)]) == "a"
        assert let_in(residency, [("first", 7), ("b", 3)]) is None
        residency.release("a", "a")
        assert let_in(residency, [("first", 7), ("b", 3)]) == "b"
        assert "a" not in residency  # it made way

    def test_who_came_in_before_another_became_first_counts_as_old(self) -> None:
        residency = full(10, old=6)
        assert let_in(residency, [("first", 7), ("a", 3)]) == "a"
        residency.release("old", "old")
        residency.lease("old", "old")
        assert let_in(residency, [("second", 8)]) is None  # the first has given up
        residency.release("old", "old")
        assert let_in(residency, [("second", 8), ("b", 2)]) == "b"

    def test_nobody_is_leased_any_more_once_the_first_was_overtaken_often(self) -> None:
        residency = full(10, old=6)
        assert residency.next_of([("first", 7)]) is None
        for number in range(PATIENCE):
            assert not residency.is_draining
            residency.lease("old", number)
            residency.release("old", number)
        assert residency.is_draining
        assert residency.next_of([("first", 7), ("old", 6)]) is None  # who is there waits too
        residency.release("old", "old")
        assert let_in(residency, [("first", 7), ("old", 6)]) == "first"
        assert not residency.is_draining

    def test_a_first_that_gives_up_stops_the_waiting(self) -> None:
        residency = full(10, old=6)
        assert residency.next_of([("first", 7)]) is None
        for number in range(PATIENCE):
            residency.lease("old", number)
        assert residency.next_of([]) is None
        assert not residency.is_draining


@pytest.mark.parametrize("tiers", [1, 2])
def test_many_threads_stay_within_the_limit(tiers: int) -> None:
    sizes = {"_0": 3, "_1": 1, "_2": 2, "_3": 5, "_4": 1, "_5": 4}
    if tiers == 2:
        store, _, device = two_tiers(2, 7, **sizes)
        memory = device.memory
    else:
        store, loader = make(loader=Loader({f"{key[1:]}-res-t": size for key, size in sizes.items()}), budget=7)
        memory = loader.memory
    memory.most = 0
    problems: list[object] = []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(120):
            name = chosen.choice(NAMES)
            future = store.request(name)
            if chosen.random() < 0.3 and future.cancel():
                continue
            with future.result(SOON) as reader:
                if reader.source.name != name or reader not in memory.inside or store.stats()["resident_bytes"] > 7:
                    problems.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    touch(store, *NAMES)  # whatever was cancelled is done with
    assert memory.most <= 7
    assert store.stats()["leased"] == 0
    assert store.stats()["resident_bytes"] == memory.n_bytes


class TestTwoTiers:
    def test_what_left_the_device_comes_back_from_the_host(self) -> None:
        store, loader, device = two_tiers(6, 2)
        assert store.stats()["uploads"] == 6
        touch(store, "0-res-t", "5-res-t", "0-res-t")
        stats = store.stats()
        assert loader.loads == Counter(NAMES)
        assert (stats["loads"], stats["uploads"], stats["evictions"], stats["hits"]) == (6, 7, 5, 2)
        assert (stats["host"], stats["resident"], stats["resident_bytes"]) == (6, 2, 2)
        assert device.memory.n_bytes == device.memory.most == 2

    def test_what_left_the_host_too_comes_from_disk(self) -> None:
        store, loader, _ = two_tiers(3, 2)
        touch(store, "3-res-t")  # on the host
        assert loader.loads["3-res-t"] == 1
        touch(store, "0-res-t")
        assert loader.loads["0-res-t"] == 2
        assert len(loader.memory.inside) == store.stats()["host"] == 3
        assert loader.memory.most == 3

    def test_room_on_the_device_is_made_before_an_unknown_size_is_placed(self) -> None:
        _, _, device = two_tiers(6, 9, _0=4, _1=5, _2=9, _3=1, _4=8, _5=1)
        assert device.memory.most == 9

    def test_without_a_budget_the_number_bounds_the_device_too(self) -> None:
        loader = Loader()
        store = SaeStore(
            SPECS,
            dtype="float32",
            device="elsewhere",
            max_loaded=2,
            describe=loader.describe,
            load=loader,
            place=Device(),
        )
        store.describe_all()
        touch(store, *NAMES)
        assert store.stats()["resident"] == store.stats()["host"] == 2


# Real SAEs

KINDS = ("standard", "jumprelu", "gated", "topk")
D_IN, D_SAE = 24, 40


def build(number: int, kind: str, **options: Any) -> Any:
    """A SAELens SAE with random weights; a fixed seed for each number."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(kind)
    options |= {"k": 4} if "topk" in kind else {}
    options |= {"max_iterations": 4} if kind == "matching_pursuit" else {}
    options |= {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 4} if kind == "temporal" else {}
    options |= {"d_out": D_IN + 1, "apply_b_dec_to_input": False} if "transcoder" in kind else {}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))
    sae.cfg.metadata.hook_name = f"blocks.{number}.hook_resid_post"
    made = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, weights in sorted(sae.named_parameters()):
            noise = torch.randn(weights.shape, generator=made)
            weights.copy_(noise.abs() if name == "threshold" else noise * 0.4)
    return sae


def saved(folder: Path, sae: Any, name: str) -> SourceSpec:
    sae.save_model(folder / name)
    return SourceSpec(name, "res-t", folder=folder / name)


def written(folder: Path, n_saes: int, **options: Any) -> tuple[list[SourceSpec], dict[str, Tensor]]:
    """SAEs on disk, and what SAELens's own `encode` answers for each, in terms of unit decoder rows."""
    specs, answers = [], {}
    for number in range(n_saes):
        sae = build(number, KINDS[number % len(KINDS)], **options)
        specs.append(saved(folder, sae, f"{number}-res-t"))
        with torch.no_grad():
            scale = 1 if sae.cfg.architecture() == "topk" else sae.W_dec.norm(dim=1)
            answers[specs[-1].name] = sae.encode(activations()) * scale
    return specs, answers


def activations() -> Tensor:
    return 2 * torch.randn(7, D_IN, generator=torch.Generator().manual_seed(99))


def on_another(master: FeatureReader, device: str) -> FeatureReader:
    """A real copy, on the only device there is."""
    assert device == "elsewhere"
    return place_on_device(master, "cpu")


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_forty_saes_in_the_room_of_eight(device: str, tmp_path: Path) -> None:
    specs, answers = written(tmp_path, 40)
    budget = 8 * max(describe(spec, "float32").n_bytes for spec in specs)
    store = SaeStore(specs, dtype="float32", device=device, max_loaded=40, budget_bytes=budget, place=on_another)
    store.describe_all()
    assert store.stats()["peak_bytes"] <= budget
    order = random.Random(3)
    for _ in range(3):
        for name in order.sample(sorted(answers), len(answers)):
            with store.lease(name) as reader:
                torch.testing.assert_close(reader.encode(activations()), answers[name], rtol=1e-5, atol=1e-5)
    stats = store.stats()
    assert 8 * describe(specs[0], "float32").n_bytes <= stats["peak_bytes"] <= budget
    assert stats["resident"] >= 8
    assert stats["evictions"] > 40
    assert stats["hits"] + (stats["uploads"] or stats["loads"]) == 3 * 40
    assert stats["loads"] == 40 if device == "elsewhere" else stats["loads"] > 80


def test_the_configuration_tells_the_size(tmp_path: Path) -> None:
    specs, _ = written(tmp_path, 4)
    for number, spec in enumerate(specs):
        numbers = sum(weights.numel() for weights in build(number, KINDS[number]).parameters())
        assert describe(spec, "float32").n_bytes == 4 * numbers
        assert describe(spec, "bfloat16").n_bytes == 2 * numbers


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", sorted(SERVED))
def test_a_copy_answers_alike_and_leaves_the_master_alone(kind: str, normalisation: str, tmp_path: Path) -> None:
    spec = saved(tmp_path, build(7, kind, normalize_activations=normalisation), "7-res-t")
    master, x = load_sae(spec, dtype="float32", device="cpu"), activations()
    kept = {name: weights.clone() for name, weights in master.module.state_dict().items()}
    expected = master.encode(x)
    assert 0 < (expected != 0).float().mean() < 1
    copied = place_on_device(master, "cpu")
    assert isinstance(copied, LoadedSae)
    assert copied.n_bytes == master.n_bytes == sum(weights.nbytes for weights in kept.values())
    torch.testing.assert_close(copied.encode(x), expected)
    torch.testing.assert_close(copied.encode_features(x, [3, 30]), master.encode_features(x, [3, 30]))
    assert torch.equal(copied.decoder_row(3), master.decoder_row(3))
    assert not any(weights.requires_grad for weights in copied.module.parameters())
    for weights in copied.module.parameters():
        weights.zero_()
    copied.free()
    assert {name: weights.tolist() for name, weights in master.module.state_dict().items()} == {
        name: weights.tolist() for name, weights in kept.items()
    }
    torch.testing.assert_close(master.encode(x), expected)


def test_pinning_changes_no_number(tmp_path: Path) -> None:
    master = load_sae(saved(tmp_path, build(1, "jumprelu"), "1-res-t"), dtype="float32", device="cpu")
    expected = master.encode(activations())
    pin(master)
    assert master.module.W_dec.is_pinned() == torch.cuda.is_available()
    torch.testing.assert_close(master.encode(activations()), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forty_saes_on_a_gpu(tmp_path: Path) -> None:
    specs, answers = written(tmp_path, 40)
    budget = 8 * max(describe(spec, "float32").n_bytes for spec in specs)
    store = SaeStore(specs, dtype="float32", device="cuda:0", max_loaded=20, budget_bytes=budget)
    store.describe_all()
    for name in random.Random(3).sample(sorted(answers), len(answers)):
        with store.lease(name) as reader:
            found = reader.encode(activations())
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), answers[name], rtol=1e-4, atol=1e-4)
    assert store.stats()["peak_bytes"] <= budget


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_what_leaves_gives_its_memory_back_at_once(device: str, tmp_path: Path) -> None:
    specs, _ = written(tmp_path, 2, normalize_activations="layer_norm")  # such modules hold themselves
    store = SaeStore(specs, dtype="float32", device=device, max_loaded=1, budget_bytes=20000, place=on_another)
    store.describe_all()
    touch(store, "0-res-t", "1-res-t")
    gc.collect()
    gc.disable()
    try:
        with store.lease("0-res-t") as reader:
            weights = weakref.ref(reader.module.W_dec)  # type: ignore[attr-defined]
        del reader
        assert weights() is not None
        touch(store, "1-res-t")
        assert (weights() is None) == (device == "cpu")
    finally:
        gc.enable()
