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
from torch.utils._python_dispatch import TorchDispatchMode

from neuronpedia_inference.domain import Sampling, Source
from neuronpedia_inference.engine.protocol import NO_TOKEN, Reading, RowSpec
from neuronpedia_inference.engine.readout import NOT_ITS_LOGITS, Readout, why_not_read_out
from neuronpedia_inference.points import Point
from neuronpedia_inference.saes.encode import NeuronReader
from neuronpedia_inference.saes.together import Together
from neuronpedia_inference.watches.plan import (
    FeaturesRead,
    LensRead,
    Place,
    TopRead,
    VectorRead,
    WatchFeature,
    WatchLens,
    WatchPlan,
)
from neuronpedia_inference.watches.readings import (
    ColumnsReading,
    FeaturesReading,
    LensReading,
    TopReading,
    VectorReading,
)
from tests import architectures, models
from tests.engine.engines import engine
from tests.engine.stores import make
from tests.engine.test_merging import PROMPTS, alone, staggered
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


@pytest.mark.parametrize("family", [*models.CONFIGS, *sorted(architectures.CONFIGS.keys() & {"cohere", "gemma3_text"})])
def test_the_lens_is_the_norm_and_the_head_of_hugging_face(family: str) -> None:
    """Behind every block, and behind the last one the model's own logits: norm and head are found by hand here."""
    net, built = models.model(family), engine(family)
    built.check_lens()
    text = PROMPTS[0]
    base: Any = net.base_model
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    config: Any = net.config
    head: Any = net.get_output_embeddings()
    for layer in range(3):
        hidden = models.read(net, family, text, layer, "hook_resid_post")
        with torch.no_grad():
            logits = head(norm(hidden[None]))[0] * getattr(config, "logit_scale", 1.0)
            cap = getattr(config, "final_logit_softcapping", None)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            found = LensReading(built.readout, models.VOCAB_SIZE, 5)(hidden)
            if layer == 2:
                own = net(torch.tensor([text]), use_cache=False).logits[0]
                torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))
        ids, logprobs = found[:, :5].long(), found[:, 5:]
        wanted = logits.log_softmax(-1).topk(5)
        torch.testing.assert_close(logprobs, wanted.values, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
        torch.testing.assert_close(logits.gather(1, ids), logits.gather(1, wanted.indices), rtol=1e-4, atol=1e-4)


def test_a_lens_that_does_not_give_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere scales its logits."""
    tree, ids = engine("cohere").decoder.tree, [1, 2, 3, 5]
    with torch.inference_mode():
        assert why_not_read_out(tree, ids) == ""
        monkeypatch.setattr(Readout, "_number", lambda self, name: None)
        assert why_not_read_out(tree, ids) == NOT_ITS_LOGITS


def test_a_row_is_read_by_the_lens_while_it_runs_and_its_tokens_stay() -> None:
    """The lens runs modules of the model in the middle of a pass that has hooks of its own on them."""
    built = engine("gemma2")
    lens = LensReading(built.readout, models.VOCAB_SIZE, 2)
    watches = tuple(built.watch(Point(layer, "hook_resid_post"), lens) for layer in range(3))
    row = RowSpec(PROMPTS[0], Sampling(6), watches=watches)
    [steps] = staggered(built.lane, [row], 1)
    tokens = [step.token_id for step in steps if step.token_id != NO_TOKEN]
    assert tokens == alone("gemma2", row)
    numbers = np.concatenate([step.numbers for step in steps if step.numbers is not None])
    text = [*PROMPTS[0], *tokens]
    assert numbers.shape == (len(text), 12)
    # Behind the last block the likeliest token is the one that is drawn.
    assert numbers[len(PROMPTS[0]) - 1 : -1, 8].tolist() == tokens
    for layer in range(3):
        with torch.no_grad():
            wanted = lens(models.read(models.model("gemma2"), "gemma2", text, layer, "hook_resid_post")).numpy()
        np.testing.assert_allclose(numbers[:, 4 * layer + 2 : 4 * layer + 4], wanted[:, 2:], rtol=1e-3, atol=1e-3)


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
        (list(row[list(place.behind)]), None if place.before is None else list(row[list(place.before)]))
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
    lens = WatchLens((LensRead(1, 1), LensRead(2, 1)))
    assert WatchPlan.of([VectorRead(Point(0, "hook_resid_pre"), 1), lens]).places({Point(1, "hook_resid_post")})[1] == (
        Place(behind=(3, 4, 5, 6), before=(1, 2, 5, 6))
    )


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


class NoHostReads(TorchDispatchMode):
    """What makes the host wait for a device is refused, whoever asks for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_nothing_that_is_read_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    """So that a step may be recorded with its watches."""
    reader = load(saved(tmp_path, build(kind)))
    readings: list[Reading] = [VectorReading(D_IN), FeaturesReading(reader, INDICES), TopReading(reader, 5)]
    if reader.source.is_read_by_column:
        readings.append(ColumnsReading([reader.feature(index) for index in INDICES]))
    for reading in readings:
        with torch.inference_mode(), NoHostReads():
            found = reading(activations())
        assert found.shape == (len(activations()), reading.n_numbers)
        assert found.dtype == torch.float32


def test_a_lens_does_not_wait_for_the_device() -> None:
    built = engine("gemma2")
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), NoHostReads():
        assert LensReading(built.readout, models.VOCAB_SIZE, 2)(hidden).shape == (3, 4)
    with pytest.raises(AssertionError), NoHostReads():
        bool((hidden > 0).any())


def test_a_vector_is_what_passes() -> None:
    hidden = torch.randn(4, 8, dtype=torch.bfloat16)
    assert torch.equal(VectorReading(8)(hidden), hidden.float())
