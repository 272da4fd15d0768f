"""Readings of SAEs against SAELens's own `encode`; where a plan finds its numbers again; sources held together."""

from __future__ import annotations

import importlib
import warnings
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuronpedia_inference.domain import Source
from neuronpedia_inference.engine.points import Point
from neuronpedia_inference.saes.encode import NeuronReader
from neuronpedia_inference.saes.together import Together
from neuronpedia_inference.watches.plan import FeaturesRead, TopRead, VectorRead, WatchFeature, WatchPlan
from neuronpedia_inference.watches.readings import ColumnsReading, FeaturesReading, TopReading, VectorReading
from tests.engine.stores import make
from tests.engine.test_saes_load import BY_COLUMN, D_IN, WHOLE, activations, build, load, saved, unfolded

INDICES = (3, 40, 0, 17)


@pytest.fixture(autouse=True, scope="module")
def _saelens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        importlib.import_module("sae_lens")


def expected(folder: Path, module: Any, name: str = "3-res-t") -> Tensor:
    """[pos, feature], by SAELens, of rows brought to unit norm where features do not depend on each other."""
    spec = saved(folder, module, name)
    reference = unfolded(spec)
    acts = reference.encode(activations()).detach()
    is_by_column = module.cfg.architecture() in BY_COLUMN
    return acts * reference.W_dec.detach().norm(dim=1) if is_by_column else acts


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in BY_COLUMN],
        ("standard", {"apply_b_dec_to_input": True}),
        ("jumprelu", {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}),
        ("standard", {"apply_b_dec_to_input": True, "normalize_activations": "constant_norm_rescale"}),
        ("gated", {"apply_b_dec_to_input": True, "normalize_activations": "layer_norm"}),
    ],
)
def test_columns_are_those_of_the_whole_sae(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    wanted = expected(tmp_path, build(kind, **options))[:, list(INDICES)]
    assert 0 < int((wanted != 0).sum()) < wanted.numel()
    reader = load(saved(tmp_path, build(kind, **options)))
    reading = ColumnsReading([reader.feature(index) for index in INDICES])
    reader.free()  # its weights are its own
    close(reading(activations()), wanted)


@pytest.mark.parametrize("kind", WHOLE)
def test_features_that_depend_on_each_other_are_read_whole(kind: str, tmp_path: Path) -> None:
    wanted = expected(tmp_path, build(kind))
    reader = load(saved(tmp_path, build(kind)))
    assert not reader.source.is_read_by_column
    close(FeaturesReading(reader, INDICES)(activations()), wanted[:, list(INDICES)])


@pytest.mark.parametrize("kind", [*BY_COLUMN, *WHOLE])
@pytest.mark.parametrize("k", [1, 7, 48])
def test_the_strongest_are_those_of_the_whole_sae(kind: str, k: int, tmp_path: Path) -> None:
    wanted = expected(tmp_path, build(kind))
    found = TopReading(load(saved(tmp_path, build(kind))), k)(activations())
    assert found.shape == (len(wanted), 2 * k)
    indices, values = found[:, :k].long(), found[:, k:]
    close(values, wanted.gather(1, indices))
    close(values, wanted.sort(dim=1, descending=True).values[:, :k])
    assert all(len(set(row)) == k for row in indices.tolist())


def test_the_strongest_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of neurons, which are what passes."""
    monkeypatch.setattr("neuronpedia_inference.watches.readings.BLOCK_ELEMENTS", 1)
    width = 600
    hidden = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    source = Source("1", "neurons", 1, "blocks.1.mlp.hook_post", width, width, "neurons")
    found = TopReading(NeuronReader(source), 4)(hidden)
    top = hidden.topk(4)
    assert torch.equal(found[:, :4].long(), top.indices)
    assert torch.equal(found[:, 4:], top.values)


def sae(name: str, layer: int, **changes: Any) -> Source:
    fields = {"source_set": "t", "n_features": 100, "width": D_IN, "architecture": "standard"}
    return Source(name=name, layer=layer, hook=f"blocks.{layer}.hook_resid_post", **{**fields, **changes})


def test_a_plan_finds_its_numbers_again() -> None:
    """Against a row written out by hand, in which every number says what it is."""
    a, b = sae("a", 1), sae("b", 2)
    plan = WatchPlan.of(
        [
            WatchFeature(a, 5),
            TopRead(b, 2),
            WatchFeature(a, 9),
            WatchFeature(a, 5),
            VectorRead(Point(1, "hook_resid_post"), 3),
        ]
    )
    assert plan.reads == (FeaturesRead(a, (5, 9)), TopRead(b, 2), VectorRead(Point(1, "hook_resid_post"), 3))
    row = np.array(
        [
            "a5 before",
            "a9 before",
            "a5",
            "a9",
            "i0",
            "i1",
            "v0",
            "v1",
            "x before",
            "y before",
            "z before",
            "x",
            "y",
            "z",
        ]
    )
    edited = {Point(1, "hook_resid_post")}
    assert plan.n_numbers(edited) == len(row)
    assert plan.n_numbers(()) == 9
    told = [
        (list(row[place.behind]), None if place.before is None else list(row[place.before]))
        for place in plan.places(edited)
    ]
    assert told == [
        (["a5"], ["a5 before"]),
        (["i0", "i1", "v0", "v1"], None),
        (["a9"], ["a9 before"]),
        (["a5"], ["a5 before"]),
        (["x", "y", "z"], ["x before", "y before", "z before"]),
    ]
    assert plan.whole == plan.held == [b]


def test_what_is_held_is_what_is_computed_whole() -> None:
    compared, neurons = sae("c", 1, architecture="topk"), sae("3", 3, architecture="neurons")
    plan = WatchPlan.of(
        [WatchFeature(compared, 1), TopRead(neurons, 2), WatchFeature(neurons, 1), TopRead(compared, 3)]
    )
    assert plan.whole == [compared, neurons]
    assert plan.held == [compared]


def drive(steps: Any, limit: int = 20) -> tuple[Any, list[Future[Any]]]:
    """Run steps while what they wait for is there: (their result or None, what they wait for)."""
    sent: Any = None
    for _ in range(limit):
        try:
            awaited: Future[Any] = steps.send(sent)
        except StopIteration as end:
            return end.value, []
        if not awaited.done():
            return None, [awaited]
        sent = awaited.result()
    raise AssertionError(limit)


def test_only_one_gathers_at_a_time_and_nobody_waits_for_ever() -> None:
    """Two want the same two of three that fit; the second holds nothing while the first waits for its second."""
    futures: dict[str, list[Future[Any]]] = {"a": [], "b": []}
    released: list[str] = []

    class Lease(ExitStack):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.callback(released.append, name)

    def request(source: Source) -> Future[Any]:
        futures[source.name].append(Future())
        return futures[source.name][-1]

    a, b = sae("a", 1), sae("b", 2)
    together, held = Together(request), [ExitStack(), ExitStack()]
    first, second = together.take([a, b], held[0]), together.take([b, a], held[1])
    assert drive(first) == (None, futures["a"])
    _, [turn] = drive(second)
    assert futures["b"] == []
    futures["a"][0].set_result(Lease("a"))
    assert first.send(futures["a"][0].result()) is futures["b"][0]
    futures["b"][0].set_result(Lease("b"))
    with pytest.raises(StopIteration) as end:
        first.send(futures["b"][0].result())
    assert list(end.value.value) == [a, b]
    assert turn.done()
    assert released == []
    held[0].close()
    assert sorted(released) == ["a", "b"]
    assert second.send(turn.result()) is futures["b"][1]
    second.close()  # its caller has gone: the turn is there for the next
    third = together.take([a], ExitStack())
    assert drive(third) == (None, futures["a"][1:])


def test_a_store_knows_what_has_room_together() -> None:
    store, _ = make(max_loaded=2)
    assert store.has_room_for(["0-res-t", "1-res-t"])
    assert not store.has_room_for(["0-res-t", "1-res-t", "2-res-t"])
    store, _ = make(budget=3)
    assert store.has_room_for(["0-res-t", "1-res-t", "2-res-t"])
    assert not store.has_room_for(["0-res-t", "1-res-t", "2-res-t", "3-res-t"])


def test_a_vector_is_what_passes() -> None:
    hidden = torch.randn(4, 8, dtype=torch.bfloat16)
    assert torch.equal(VectorReading(8)(hidden), hidden.float())
