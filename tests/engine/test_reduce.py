"""Reductions against full-matrix sorts and explicit loops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from neuronpedia_inference import costs
from neuronpedia_inference.costs import ACTIVE_BYTES, RANKED_BYTES, TOP_BYTES, peak_bytes
from neuronpedia_inference.domain import RankedFeature, Ranking, Source
from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.saes import reduce
from neuronpedia_inference.saes.encode import FeatureReader, LoadedSae, NeuronReader
from neuronpedia_inference.saes.order import any_topk, merge_topk, stable_topk
from neuronpedia_inference.saes.reduce import (
    FeatureRanker,
    active_features,
    dfa,
    feature_values,
    top_features,
)
from tests.allocation import allocated_at_the_peak
from tests.steps import result_of


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven features at a time, so that every result is merged from many blocks."""
    monkeypatch.setattr(reduce, "block_of", lambda x: 7)


def reader_of(name: str, n_features: int) -> NeuronReader:
    """A reader whose activations are its input."""
    return NeuronReader(Source(name, "t", 0, "blocks.0.mlp.hook_post", n_features, n_features, "neurons"))


def sparse(n_pos: int, n_features: int, seed: int) -> Tensor:
    """Few distinct values and many zeros: ties everywhere."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 4, (n_pos, n_features), generator=made).clamp(min=0).float() / 4


class TestStableTopK:
    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf]), min_size=1, max_size=30), st.data()
    )
    def test_equals_a_stable_sort(self, values: list[float], data: st.DataObject) -> None:
        k = data.draw(st.integers(0, len(values)))
        found, indices = stable_topk(torch.tensor(values), k)
        expected = sorted(range(len(values)), key=lambda i: -values[i])[:k]
        assert indices.tolist() == expected
        assert found.tolist() == [values[i] for i in expected]

    def test_rows_are_independent(self) -> None:
        x = sparse(20, 50, seed=1)
        values, indices = stable_topk(x, 9)
        expected = x.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :9])
        assert torch.equal(indices, expected.indices[:, :9])

    @pytest.mark.parametrize(("n", "k"), [(512, 1), (1000, 1), (3001, 5), (4096, 8)])
    @pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
    def test_long_rows_are_looked_at_by_blocks(self, shape: tuple[int, ...], n: int, k: int) -> None:
        """Ties within blocks, between them, and behind the last whole one."""
        x = sparse(math.prod(shape), n, seed=n).view(*shape, n)
        x[..., -1] = x.max()
        expected = x.sort(dim=-1, descending=True, stable=True)
        values, indices = stable_topk(x, k)
        assert torch.equal(values, expected.values[..., :k])
        assert torch.equal(indices, expected.indices[..., :k])
        values, indices = any_topk(x, k)
        assert torch.equal(values, expected.values[..., :k])
        assert torch.equal(x.gather(-1, indices), values)
        assert all(len(set(row)) == k for row in indices.view(-1, k).tolist())

    def test_a_number_that_is_none_comes_out_of_long_rows(self) -> None:
        x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
        x[1, 3000] = math.nan
        values, indices = any_topk(x, 4)
        assert values.isnan().any(dim=1).tolist() == [False, True]
        assert indices[1, 0] == 3000

    def test_merging_halves_equals_the_whole(self) -> None:
        x = sparse(20, 50, seed=2)
        right = stable_topk(x[:, 25:], 9)
        merged = merge_topk(stable_topk(x[:, :25], 9), (right[0], right[1] + 25), 9)
        for part, whole in zip(merged, stable_topk(x, 9), strict=True):
            assert torch.equal(part, whole)


def rank_features(readers: Iterable[tuple[FeatureReader, Tensor]], ranking: Ranking) -> list[RankedFeature]:
    """Source by source, as the worker does it."""
    ranker = FeatureRanker(ranking)
    for reader, x in readers:
        result_of(ranker.add(reader, x))
    found = ranker.result()
    return [found[row] for row in range(len(found))]


def naive_ranking(pairs: Sequence[tuple[str, Tensor]], ranking: Ranking) -> list[tuple[str, int, list[float], float]]:
    """(source, feature, values, key) by a sort of every row of every source, in Python."""
    rows = []
    for name, acts in pairs:
        for index in range(acts.shape[1]):
            values = acts[:, index].tolist()
            if ranking.ignore_first:
                values[0] = 0.0
            chosen = [times * values[position] for position, times in ranking.weights.items()]
            scale = float(ranking.scales[name][index]) if name in ranking.scales else 1.0
            rows.append((name, index, values, scale * (math.fsum(chosen) if chosen else max(values))))
    return sorted(rows, key=lambda row: -row[3])[: ranking.limit]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_pos=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    limit=st.integers(0, 60),
    ignore_first=st.booleans(),
    data=st.data(),
)
def test_ranking_equals_a_full_sort(
    seed: int, n_pos: int, sizes: list[int], limit: int, ignore_first: bool, data: st.DataObject
) -> None:
    """Values are quarters, so that sums are exact and ties are real."""
    columns = data.draw(st.lists(st.integers(0, n_pos - 1), max_size=5))
    acts = [(f"{n}-t", sparse(n_pos, size, seed + n)) for n, size in enumerate(sizes)]
    scaled = data.draw(st.sets(st.sampled_from([name for name, _ in acts])))
    powers = {name: np.arange(a.shape[1]) % 7 * 0.5 for name, a in acts if name in scaled}
    ranking = Ranking(limit, ignore_first, Counter(columns), powers)
    block = data.draw(st.integers(1, 50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "block_of", lambda x: block)
        found = rank_features(((reader_of(name, a.shape[1]), a) for name, a in acts), ranking)
    expected = naive_ranking(acts, ranking)
    assert [(row.source, row.index, row.values.tolist()) for row in found] == [row[:3] for row in expected]
    for row, (_, _, values, key) in zip(found, expected, strict=True):
        assert row.max_value == max(values)
        assert row.max_value_index == values.index(max(values))
        assert row.sum_values == (key if columns else 0.0)
        assert row.dfa is None


class TestRanking:
    def test_negative_neurons_lose_to_the_zeroed_first_position(self) -> None:
        x = torch.tensor([[9.0, 9.0], [-1.0, 2.0]])
        found = rank_features([(reader_of("3", 2), x)], Ranking(2))
        assert [(row.index, row.values.tolist(), row.max_value, row.max_value_index) for row in found] == [
            (1, [0.0, 2.0], 2.0, 1),
            (0, [0.0, -1.0], 0.0, 0),
        ]

    def test_the_first_position_counts_when_kept(self) -> None:
        x = torch.tensor([[9.0, 1.0], [1.0, 2.0]])
        (first, _) = rank_features([(reader_of("3", 2), x)], Ranking(2, ignore_first=False))
        assert (first.index, first.max_value, first.max_value_index) == (0, 9.0, 0)

    def test_an_infinite_first_position_does_no_harm_when_ignored(self) -> None:
        x = torch.tensor([[math.inf, math.nan], [1.0, 2.0]])
        assert [row.index for row in rank_features([(reader_of("3", 2), x)], Ranking(5))] == [1, 0]

    def test_duplicates_count_twice(self) -> None:
        x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.5]])
        once = rank_features([(reader_of("3", 2), x)], Ranking(1, weights=Counter((1, 2))))
        twice = rank_features([(reader_of("3", 2), x)], Ranking(1, weights=Counter((1, 1, 2))))
        assert (once[0].index, once[0].sum_values) == (1, 1.5)
        assert (twice[0].index, twice[0].sum_values) == (0, 2.0)

    def test_many_repeats_are_weights_and_cost_nothing(self) -> None:
        x = torch.rand(200, 4096)
        repeats = Counter(dict.fromkeys(range(1, 4), 60000))
        ranker = FeatureRanker(Ranking(10, weights=repeats))
        assert allocated_at_the_peak(lambda: result_of(ranker.add(reader_of("3", 4096), x))) < 4 * x.nbytes
        found = ranker.result()
        expected = (60_000 * x[1:4]).sum(dim=0).sort(descending=True, stable=True)
        assert found.indices.tolist() == expected.indices[:10].tolist()
        assert found.sum_values.tolist() == pytest.approx(expected.values[:10].tolist(), rel=1e-6)

    def test_sources_are_taken_one_by_one(self) -> None:
        alive: list[str] = []

        def leases() -> Iterator[tuple[FeatureReader, Tensor]]:
            for n in range(3):
                alive.append(f"{n}-t")
                assert len(alive) == 1
                yield reader_of(f"{n}-t", 10), sparse(3, 10, n)
                alive.pop()

        assert len(rank_features(leases(), Ranking(30))) == 30

    def test_the_ranker_may_be_fed_prompt_by_prompt(self) -> None:
        readers = [reader_of(f"{n}-t", 30) for n in range(3)]
        prompts = [[sparse(4, 30, 10 * p + n) for n in range(3)] for p in range(2)]
        rankers = [FeatureRanker(Ranking(12)) for _ in prompts]
        for n, reader in enumerate(readers):
            for prompt, ranker in zip(prompts, rankers, strict=True):
                result_of(ranker.add(reader, prompt[n]))
        for prompt, ranker in zip(prompts, rankers, strict=True):
            alone = rank_features(zip(readers, prompt, strict=True), Ranking(12))
            found = ranker.result()
            assert len(found) == len(alone) == 12
            for row, expected in enumerate(alone):
                assert (found[row].source, found[row].index) == (expected.source, expected.index)
                assert found[row].values.tolist() == expected.values.tolist()

    def test_nothing_in_nothing_out(self) -> None:
        assert rank_features([], Ranking(5)) == []
        assert rank_features([(reader_of("3", 4), torch.ones(2, 4))], Ranking(0)) == []

    def test_only_blocks_are_held(self) -> None:
        """A wide source is never encoded whole."""
        widest = 0

        @dataclass
        class Watched:
            source: Source
            steerable: bool = True

            def blocks(self, x: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
                nonlocal widest
                for first in range(0, self.source.n_features, block):
                    part = torch.zeros(len(x), min(block, self.source.n_features - first))
                    widest = max(widest, part.numel())
                    yield first, part

        wide = Source("0-t", "t", 0, "blocks.0.hook_resid_pre", 40 * 2**18, 4, "standard")
        found = rank_features([(Watched(wide), torch.zeros(8, 4))], Ranking(3))  # type: ignore[list-item]
        assert [row.index for row in found] == [0, 1, 2]
        assert widest <= reduce.BLOCK_ELEMENTS


@pytest.mark.usefixtures("_small_blocks")
class TestTopFeatures:
    @pytest.mark.parametrize("k", [1, 5, 29, 30, 500])
    def test_equals_a_stable_sort_of_every_position(self, k: int) -> None:
        x = sparse(6, 30, seed=4)
        found = result_of(top_features(reader_of("3", 30), x, k))
        for indices, values, row in zip(found.indices.tolist(), found.values.tolist(), x.tolist(), strict=True):
            assert indices == sorted(range(30), key=lambda i: -row[i])[:k]
            assert values == [row[i] for i in indices]

    @pytest.mark.parametrize("k", [1, 5, 30])
    def test_what_is_multiplied_for_the_ranking_is_told_as_it_is(self, k: int) -> None:
        x, scales = sparse(6, 30, seed=4), np.random.default_rng(3).uniform(0.01, 2, 30).astype(np.float32)
        found = result_of(top_features(reader_of("3", 30), x, k, scales))
        for indices, values, row in zip(found.indices.tolist(), found.values.tolist(), x.tolist(), strict=True):
            scaled = [float(np.float32(value) * scale) for value, scale in zip(row, scales, strict=True)]
            assert indices == sorted(range(30), key=lambda i, scaled=scaled: -scaled[i])[:k]
            assert values == [row[i] for i in indices]

    def test_zero_features_give_empty_rows(self) -> None:
        found = result_of(top_features(reader_of("3", 8), torch.ones(2, 8), 0))
        assert found.indices.shape == found.values.shape == (2, 0)

    def test_numbers_are_as_small_as_they_came(self) -> None:
        found = result_of(top_features(reader_of("3", 30), sparse(6, 30, seed=4), 5))
        assert (found.indices.dtype, found.values.dtype) == ("int32", "float32")


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("first", [0, 1, 4])
def test_active_features_come_in_order_of_first_firing(first: int) -> None:
    x = sparse(6, 30, seed=5)
    x[2, 3] = -0.5
    expected: dict[int, list[tuple[int, float]]] = {}
    for position in range(first, 6):
        for index in range(30):
            if x[position, index] != 0:
                expected.setdefault(index, []).append((position, x[position, index].item()))
    n_found, active = result_of(active_features(reader_of("3", 30), x, first=first, most=1000))
    assert active is not None
    rows = [active[row] for row in range(len(active))]
    assert [(index, list(zip(places, values, strict=True))) for index, places, values in rows] == [*expected.items()]
    assert 5 < n_found == sum(map(len, expected.values())) < 120


@pytest.mark.usefixtures("_small_blocks")
def test_too_many_active_features_are_counted_and_not_kept() -> None:
    x = torch.ones(6, 30)
    for most, kept in ((179, False), (180, True)):
        n_found, active = result_of(active_features(reader_of("3", 30), x, most=most))
        assert (n_found, active is not None) == (180, kept)


def test_no_active_features() -> None:
    n_found, active = result_of(active_features(reader_of("3", 4), torch.zeros(3, 4), most=10))
    assert active is not None
    assert (n_found, len(active)) == (0, 0)


def test_feature_values_are_float32_of_whatever_came() -> None:
    x = torch.tensor([[1.0, 0.1], [2.0, 0.2]], dtype=torch.float16)
    found = feature_values(reader_of("3", 2), x, 1)
    assert found.tolist() == x[:, 1].float().tolist()
    assert found.dtype == "float32"


@pytest.mark.usefixtures("_small_blocks")
def test_others_may_have_a_turn_after_every_block() -> None:
    x = torch.ones(3, 30)  # five blocks
    assert len(list(top_features(reader_of("3", 30), x, 2))) == 5
    assert len(list(active_features(reader_of("3", 30), x, most=1000))) == 5
    assert len(list(FeatureRanker(Ranking(2)).add(reader_of("3", 30), x))) == 5


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
class TestNotFinite:
    def x(self, bad: float) -> Tensor:
        x = torch.ones(3, 20)
        x[1, 11] = bad
        return x

    def test_everything_refuses(self, bad: float) -> None:
        x, reader = self.x(bad), reader_of("3", 20)
        for ask in (
            lambda: feature_values(reader, x, 11),
            lambda: result_of(top_features(reader, x, 2)),
            lambda: result_of(active_features(reader, x, most=1000)),
            lambda: rank_features([(reader, x)], Ranking(2)),
            lambda: rank_features([(reader, x)], Ranking(2, weights={1: 1})),
        ):
            with pytest.raises(EngineFailed, match="'3' gave a value that is not finite"):
                ask()
        assert feature_values(reader, x, 10).tolist() == [1.0, 1.0, 1.0]

    def test_attribution_refuses(self, bad: float) -> None:
        pattern, v, column = torch.ones(2, 3, 3), torch.ones(3, 2, 2), torch.ones(4)
        v[1, 1, 0] = bad
        with pytest.raises(EngineFailed, match="not finite"):
            dfa(pattern, v, column, 2)


class TestAttribution:
    def made(self, heads: int, kv: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """pattern [heads, 6, 6], causal and softmaxed; v [6, kv, 5]; column [heads * 5]"""
        made = torch.Generator().manual_seed(seed)
        scores = torch.randn(heads, 6, 6, generator=made).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        return scores.softmax(-1), torch.randn(6, kv, 5, generator=made), torch.randn(heads * 5, generator=made)

    def by_loops(self, pattern: Tensor, v: Tensor, column: Tensor, target: int) -> list[float]:
        heads, (n_pos, kv, d_head) = len(pattern), v.shape
        out = []
        for s in range(n_pos):
            total = 0.0
            for h in range(heads):
                shared = h // (heads // kv)
                dot = sum(v[s, shared, d].item() * column[h * d_head + d].item() for d in range(d_head))
                total += pattern[h, target, s].item() * dot
            out.append(total)
        return out

    @pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (6, 2), (4, 1), (1, 1)])
    @pytest.mark.parametrize("target", [0, 3, 5])
    def test_against_loops(self, heads: int, kv: int, target: int) -> None:
        parts = self.made(heads, kv)
        found = dfa(*parts, target)
        assert found.values == pytest.approx(self.by_loops(*parts, target), abs=1e-5)
        assert found.target_index == target
        assert len(found.values) == 6
        assert all(value == 0 for value in found.values[target + 1 :])

    def test_sums_to_the_activation_of_the_heads(self) -> None:
        """Adding over source positions gives the encoder column times the mixed values at the target."""
        pattern, v, column = self.made(6, 2, seed=3)
        mixed = torch.einsum("hs,shd->hd", pattern[:, 4], v.repeat_interleave(3, dim=1))
        assert sum(dfa(pattern, v, column, 4).values) == pytest.approx((mixed.flatten() @ column).item(), abs=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_promoted(self, dtype: torch.dtype) -> None:
        pattern, v, column = (part.to(dtype) for part in self.made(4, 2))
        v, column = v * 1000, column * 1000  # products past the range of float16
        expected = self.by_loops(pattern, v, column, 5)
        assert max(map(abs, expected)) > 65504
        assert dfa(pattern, v, column, 5).values == pytest.approx(expected, rel=1e-5)

    def test_mixed_precision_takes_the_widest(self) -> None:
        pattern, v, column = self.made(4, 2)
        found = dfa(pattern.double(), v.half(), column, 5)
        expected = self.by_loops(pattern.double(), v.half(), column, 5)
        assert found.values == pytest.approx(expected, abs=1e-12)

    def test_a_column_of_another_width_is_refused(self) -> None:
        pattern, v, column = self.made(4, 2)
        with pytest.raises(EngineFailed, match="19 numbers.*20"):
            dfa(pattern, v, column[:-1], 5)


ARCHITECTURES: dict[str, tuple[type[Any], Any]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "topk": (TopKSAE, partial(TopKSAEConfig, k=16)),
}


def random_sae(architecture: str, width: int, n_features: int) -> LoadedSae:
    kind, config = ARCHITECTURES[architecture]
    module = kind(config(d_in=width, d_sae=n_features, metadata=SAEMetadata(hook_name="blocks.0.hook_resid_post")))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    module.turn_off_forward_pass_hook_z_reshaping()
    module.requires_grad_(False)
    source = Source("0-x", "x", 0, "blocks.0.hook_resid_post", n_features, width, architecture)
    return LoadedSae(source, module)


class TestMemory:
    @pytest.fixture(autouse=True)
    def _real_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reduce, "BLOCK_ELEMENTS", 2**20)
        monkeypatch.setattr(costs, "BLOCK_ELEMENTS", 2**20)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize(("n_pos", "width", "n_features"), [(16, 512, 32768), (200, 64, 32768), (64, 64, 1024)])
    def test_stays_within_the_formula(self, architecture: str, n_pos: int, width: int, n_features: int) -> None:
        reader = random_sae(architecture, width, n_features)
        x = torch.randn(n_pos, width)
        bound = peak_bytes(reader.source, n_pos)
        kept = 8 * n_pos * 30 * 2 + 2**16

        def rank() -> None:
            ranker = reduce.FeatureRanker(Ranking(25))
            result_of(ranker.add(reader, x))
            ranker.result()

        assert allocated_at_the_peak(rank) <= bound + kept
        scales = np.ones(n_features)
        assert allocated_at_the_peak(lambda: result_of(top_features(reader, x, 25))) <= bound + kept
        assert allocated_at_the_peak(lambda: result_of(top_features(reader, x, 25, scales))) <= bound + kept
        everything = 4 * n_pos * n_features
        if architecture != "topk" and everything > 2**24:
            assert bound < 2 * everything  # all features at once would take more than four times `everything`

    @pytest.mark.parametrize(("n_pos", "n_features"), [(16, 32768), (200, 4096)])
    def test_results_stay_within_what_is_admitted_for_them(self, n_pos: int, n_features: int) -> None:
        """Neurons have no zeros: everything is active, which is the most that can be found."""
        reader, x = reader_of("3", n_features), torch.rand(n_pos, n_features) + 0.1
        bound = peak_bytes(reader.source, n_pos)

        def rank() -> None:
            ranker = FeatureRanker(Ranking(1000))
            result_of(ranker.add(reader, x))
            ranker.result()

        every = n_pos * n_features
        assert allocated_at_the_peak(rank) <= bound + RANKED_BYTES * 1000 * n_pos
        scales, kept = np.ones(n_features), TOP_BYTES * 256 * n_pos
        assert allocated_at_the_peak(lambda: result_of(top_features(reader, x, 256))) <= bound + kept
        assert allocated_at_the_peak(lambda: result_of(top_features(reader, x, 256, scales))) <= bound + kept
        for most in (every, every // 10):
            taken = allocated_at_the_peak(lambda most=most: result_of(active_features(reader, x, most=most)))
            assert taken <= bound + ACTIVE_BYTES * most

    @pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
    def test_one_feature_needs_no_matrix(self, architecture: str) -> None:
        reader = random_sae(architecture, 64, 32768)
        x = torch.randn(100, 64)
        assert allocated_at_the_peak(lambda: reduce.feature_values(reader, x, 7)) < 4 * x.numel() * 4 < 4 * 100 * 32768
