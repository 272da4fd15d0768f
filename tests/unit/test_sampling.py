"""Drawing tokens, against the same written out for one row in float64: distributions, seeds, penalties, reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.engine import sampling as drawing
from neuronpedia_inference.engine.sampling import BLOCK, LEAST_LOGPROB, Drawn, Sampler, draw
from tests.host_reads import HostReads

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
N_VOCAB = 3 * BLOCK + 17
PROMPT = (3, 3, 5, 700, 784)
SMALL = 2e-5
"""What float32 may move a boundary by: weights of any size have been exponents of at most 88, rounded by 6e-8 of that,
and sums of 256 such weights add 256 roundings of half that size at the very most."""


def draws(sampling: Sampling, n: int, prompt: tuple[int, ...] = (), logits: Tensor = LOGITS) -> list[int]:
    sampler = Sampler(sampling, prompt)
    return [drawn(sampler, logits).token_id for _ in range(n)]


def drawn(sampler: Sampler, logits: Tensor) -> Drawn:
    (found,) = draw(logits[None], [sampler])
    assert found.is_finite
    assert found.is_possible
    sampler.commit(found.token_id)
    return found


def shifted(logits: Tensor, sampling: Sampling, written: Sequence[int]) -> Any:
    """[vocab], in float64: what is drawn from before the temperature. written: the output alone."""
    wide = logits.double().numpy().copy()
    for token, bias in sampling.logit_bias:
        wide[token] += bias
    for token, count in Counter(written).items():
        wide[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return wide


def probabilities(logits: Tensor, sampling: Sampling, seen: Sequence[int]) -> Any:
    """[vocab], in float64 and in words of the contract. seen: prompt and output."""
    wide = shifted(logits, sampling, seen[len(PROMPT) :])
    scaled = (wide - wide.max()) / sampling.temperature
    for token, count in Counter(seen).items():
        scaled[token] -= sampling.freq_penalty * count
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    before = 0.0
    for place, token in enumerate(order):
        if sampling.top_p < 1 and place and before >= sampling.top_p:
            before += weights[token]
            weights[token] = 0
            continue
        before += weights[token]
    return weights / weights.sum()


def inverted(weights: Any, uniform: float) -> tuple[int, float]:
    """The place, and how far the uniform is from the next boundary."""
    sums = np.cumsum(weights) / weights.sum()
    inside = [*sums[:-1]]
    return int(np.sum(sums <= uniform)), min((abs(uniform - edge) for edge in inside), default=1.0)


def expected(sampler: Sampler, logits: Tensor, seen: Sequence[int]) -> tuple[int, float]:
    weights = probabilities(logits, sampler.sampling, seen)
    for_block, for_token = map(float, sampler.uniforms())
    starts = range(0, len(weights), BLOCK)
    block, one = inverted(np.array([weights[start : start + BLOCK].sum() for start in starts]), for_block)
    token, other = inverted(weights[block * BLOCK : (block + 1) * BLOCK], for_token)
    return block * BLOCK + token, min(one, other)


MANY = [
    Sampling(1, temperature=0.7, seed=1),
    Sampling(1, temperature=1.0, freq_penalty=0.6, seed=-1),
    Sampling(1, temperature=1.3, freq_penalty=-0.4, seed=2**63 - 1),
    Sampling(1, temperature=100.0, seed=3),
    Sampling(1, temperature=1.0, freq_penalty=100.0, seed=4),
    Sampling(1, temperature=1.0, freq_penalty=-100.0, seed=5),
    Sampling(1, temperature=1.0, top_p=0.0, seed=6),
    Sampling(1, temperature=1.0, top_p=0.35, seed=7),
    Sampling(1, temperature=2.0, top_p=0.9, freq_penalty=0.2, seed=8),
    Sampling(1, temperature=1.0, top_p=1.0, seed=9),
    Sampling(1, temperature=1e-30, seed=10),
    Sampling(1, seed=11),
    Sampling(1, frequency_penalty=0.7, presence_penalty=1.5, logit_bias=((9, 3.0), (700, -100.0))),
    Sampling(1, presence_penalty=-2.0),
    Sampling(1, temperature=0.6, frequency_penalty=2.0, presence_penalty=2.0, seed=12),
    Sampling(1, temperature=1.2, frequency_penalty=-2.0, logit_bias=((5, 100.0), (6, 99.0)), seed=13),
    Sampling(1, temperature=0.9, freq_penalty=0.5, presence_penalty=-1.0, logit_bias=((3, -1.0),), top_p=0.8, seed=14),
]


@pytest.mark.parametrize("scale", [0.5, 4.0, 1e30])
def test_all_rows_in_one_pass_draw_what_each_draws_written_out(scale: float) -> None:
    made = torch.Generator().manual_seed(3)
    samplers = [Sampler(one, PROMPT) for one in MANY]
    seen: list[list[int]] = [list(PROMPT) for _ in MANY]
    n_compared = 0
    for _ in range(12):
        logits = scale * torch.randn(len(MANY), N_VOCAB, generator=made)
        found = draw(logits, samplers)
        for row, one in enumerate(samplers):
            assert found[row].is_finite
            assert found[row].is_possible
            if one.is_greedy:
                wide = shifted(logits[row], one.sampling, seen[row][len(PROMPT) :])
                second, first = np.sort(wide)[-2:]
                wanted, margin = int(wide.argmax()), 1.0 if first - second > 1e-6 * abs(wide).max() else 0.0
            else:
                wanted, margin = expected(one, logits[row], seen[row])
            assert found[row].token_id == wanted or margin < SMALL, one.sampling
            n_compared += margin >= SMALL
            one.commit(found[row].token_id)
            seen[row].append(found[row].token_id)
    assert n_compared > 0.95 * 12 * len(MANY)


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    logits = 3 * torch.randn(len(MANY), N_VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [replace(one, n_logprobs=row % 4) for row, one in enumerate(MANY)]
    merged = draw(logits, [Sampler(one, (1, 2, 2)) for one in rows])
    for row, one in enumerate(rows):
        (alone,) = draw(logits[row : row + 1], [Sampler(one, (1, 2, 2))])
        assert merged[row].token_id == alone.token_id
        assert [token for token, _ in merged[row].top] == [token for token, _ in alone.top]
        assert len(alone.top) == one.n_logprobs
        assert merged[row].logprob == pytest.approx(alone.logprob, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_said_of_its_own_row(bad: float) -> None:
    logits = torch.randn(len(MANY), N_VOCAB, generator=torch.Generator().manual_seed(1))
    usual = draw(logits, [Sampler(one, ()) for one in MANY])
    for row in (0, 4, 8, len(MANY) - 1):
        broken = logits.clone()
        broken[row, 300] = bad
        found = draw(broken, [Sampler(one, ()) for one in MANY])
        assert [one.is_finite for one in found] == [place != row for place in range(len(MANY))]
        assert [one for place, one in enumerate(found) if place != row] == usual[:row] + usual[row + 1 :]


def test_numbers_that_leave_no_distribution_are_said_of_their_own_row() -> None:
    rows = [Sampling(1, temperature=math.nan), Sampling(1, temperature=1.0, freq_penalty=-1e308), MANY[0]]
    found = draw(LOGITS.repeat(3, 1), [Sampler(one, (0, 0, 0)) for one in rows])
    assert [one.is_possible for one in found] == [False, False, True]


def test_the_largest_logits_do_not_overflow() -> None:
    least = torch.finfo(torch.float32).min
    logits = torch.full((N_VOCAB,), least)
    logits[400] = -least
    assert set(draws(Sampling(1, temperature=1.0, top_p=0.5), 5, logits=logits)) == {400}
    assert set(draws(Sampling(1, temperature=5e-324), 5, logits=logits)) == {400}


def test_rewards_keep_the_digits_of_what_they_lift() -> None:
    """Two tokens lifted by the same 400,000: float32 there has no digits left for the difference between them."""
    logits = torch.zeros(N_VOCAB)
    logits[[20, 600]] = torch.tensor([1.0, 1.0 + 0.02])
    sampler = Sampler(Sampling(1, temperature=1.0, freq_penalty=-100.0), (20, 600) * 4000)
    weights = probabilities(logits, sampler.sampling, (20, 600) * 4000)
    assert weights[20] == pytest.approx(1 / (1 + math.exp(0.02)))
    counts = Counter(
        draw(logits[None], [Sampler(replace(sampler.sampling, seed=n), (20, 600) * 4000)])[0].token_id
        for n in range(300)
    )
    assert set(counts) == {20, 600}
    edge = sum(
        int(float(Sampler(replace(sampler.sampling, seed=n), ()).uniforms()[0]) < weights[20]) for n in range(300)
    )
    assert counts[20] == edge


def test_greedy_takes_the_largest_and_ignores_seed_and_penalty() -> None:
    assert draws(Sampling(1, temperature=0, freq_penalty=9, seed=5), 20) == [0] * 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_of_the_output_count_nothing_of_the_prompt(temperature: float) -> None:
    """Each token of the output takes three quarters of a logit off itself: the best, then the next, then the first."""
    sampling = Sampling(1, temperature=temperature, top_p=0.0, frequency_penalty=0.5, presence_penalty=0.25)
    logits = torch.tensor([1.0, 0.6, -9.0])
    assert draws(sampling, 4, prompt=(0,) * 9, logits=logits) == [0, 1, 0, 1]
    assert draws(Sampling(1, temperature=temperature, top_p=0.0), 4, logits=logits) == [0] * 4


def test_a_bias_moves_what_is_drawn_and_not_what_is_reported() -> None:
    plain, biased = (
        drawn(Sampler(Sampling(1, n_logprobs=2, logit_bias=bias), ()), LOGITS) for bias in ((), ((2, 100.0),))
    )
    assert (plain.token_id, biased.token_id) == (0, 2)
    assert biased.top == plain.top
    assert biased.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[2]), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    n = 6000
    counts = torch.bincount(torch.tensor(draws(Sampling(1, temperature=temperature, seed=1), n)), minlength=5) / n
    assert torch.allclose(counts, (LOGITS / temperature).softmax(-1).float(), atol=0.02)


def test_top_p_keeps_the_first_of_equals() -> None:
    equal = torch.zeros(8)
    assert set(draws(Sampling(1, temperature=1.0, top_p=0.5, seed=1), 100, logits=equal)) == {0, 1, 2, 3}
    assert set(draws(Sampling(1, temperature=1.0, top_p=0.0, seed=1), 20, logits=equal)) == {0}


@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0, 30.0])
@pytest.mark.parametrize("n_vocab", [5, 3000, 50_000])
def test_top_p_of_few_tokens_is_that_of_all(n_vocab: int, scale: float) -> None:
    """Bit for bit, also where many are equally likely, and for what is just below 1."""
    logits = scale * torch.randn(4, n_vocab, generator=torch.Generator().manual_seed(n_vocab))
    for each in (logits, (4 * logits).round() / 4):
        weights = each.softmax(-1)
        for top_p in (0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 6e-8):
            bound = torch.full((4, 1), top_p)
            found, expected = drawing._nucleus(weights, bound), drawing._in_order(weights, bound)
            assert torch.equal(found, expected)
            assert top_p > 0.5 or n_vocab == 5 or not torch.equal(found, weights), "some are left out"


def test_the_seed_decides_and_nothing_else() -> None:
    one, same, other = (draws(Sampling(1, temperature=1.0, seed=s), 200) for s in (3, 3, 4))
    torch.rand(1000)
    assert one == same == draws(Sampling(1, temperature=1.0, seed=3), 200)
    assert one != other


def test_a_draw_that_is_not_committed_is_drawn_again() -> None:
    sampler = Sampler(Sampling(1, temperature=1.0, seed=3, freq_penalty=0.1), (1,))
    again = [draw(LOGITS[None], [sampler])[0].token_id for _ in range(10)]
    assert len(set(again)) == 1
    assert len(set(draws(sampler.sampling, 10, (1,)))) > 1


def test_uniforms_do_not_repeat() -> None:
    """Across what is made at once, and between seeds that follow each other."""
    numbers = set()
    for seed in (0, 1, 2, -1):
        sampler = Sampler(Sampling(1, temperature=1.0, seed=seed), ())
        for _ in range(200):
            numbers.add(tuple(sampler.uniforms()))
            sampler.commit(0)
    assert len(numbers) == 800
    assert abs(np.mean([*numbers]) - 0.5) < 4 / math.sqrt(12 * 1600)


def test_the_penalty_counts_prompt_and_output() -> None:
    """After the temperature: logits / T − penalty × count (contract 3.5)."""
    strong = Sampling(1, temperature=0.5, freq_penalty=1000.0, seed=0)
    assert set(draws(strong, 3, prompt=(0, 0))) == {1, 2, 3}  # 0 was in the prompt, each draw blocks itself
    lenient = draws(Sampling(1, temperature=0.5, freq_penalty=-1000.0, seed=0), 5, prompt=(3,))
    assert lenient == [3] * 5


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-6, 1e6, 1.7e308])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    found = draws(Sampling(1, temperature=temperature, seed=0), 50)
    assert set(found) == {0} if temperature < 1 else len(set(found)) > 3


def test_logprobs_are_bounded_below_for_json() -> None:
    logits = torch.tensor([500.0, 0.0, 0.0, 0.0, 0.0])
    sampler = Sampler(Sampling(1, temperature=1.0, freq_penalty=100.0, n_logprobs=9), (0,) * 10)
    found = drawn(sampler, logits)
    assert found.logprob == LEAST_LOGPROB
    assert found.top[0] == (0, 0.0)
    assert [value for _, value in found.top[1:]] == [LEAST_LOGPROB] * 4
    plain = drawn(Sampler(Sampling(1), ()), logits)
    assert (plain.logprob, plain.top) == (None, ())


class Operations(TorchDispatchMode):
    """Collects what runs, and refuses tensors that a device may not have."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        tensors = [one for one in (*args, found) if isinstance(one, Tensor)]
        assert all(one.dtype is not torch.float64 for one in tensors), f"{func} is in float64"
        return found


@pytest.mark.parametrize("n_rows", [1, 5, len(MANY)])
def test_the_host_reads_once_whatever_is_drawn(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a device is asked: on a CPU nobody waits."""
    monkeypatch.setattr(drawing, "_nucleus", drawing._in_order)
    logits = torch.randn(n_rows, N_VOCAB)
    samplers = [Sampler(replace(one, n_logprobs=row % 3), (1, 1, 2)) for row, one in enumerate(MANY[:n_rows])]
    with HostReads() as reads, Operations() as ran:
        draw(logits, samplers)
    assert reads.names == ["tolist"]
    assert not ran.names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "bincount"}


def test_what_is_taken_back_leaves_the_counts_as_they_were_and_is_not_drawn_there_again() -> None:
    """Beside a sampler to which it never happened; of the distribution without the banned tokens."""
    sampling = Sampling(9, temperature=0.8, freq_penalty=0.6, seed=4, n_logprobs=2)
    one, other = Sampler(sampling, (1, 2, 2)), Sampler(sampling, (1, 2, 2))
    other.commit(7)
    for token in (7, 2, 9):
        one.commit(token)
    one.take_back([2, 9])
    seen = {int(i): float(p) for i, p in zip(*one.penalties(260), strict=True) if p}
    assert seen == {int(i): float(p) for i, p in zip(*other.penalties(260), strict=True)}
    logits = torch.randn(260, generator=torch.Generator().manual_seed(1))
    logits[[2, 11]] = 60.0
    assert one.banned == [2]
    assert drawn(one, logits).token_id == 11
    assert one.banned == ()
    one.take_back([11])
    assert one.banned == [2, 11]
    logits[30] = 50.0
    found = drawn(one, logits)
    assert found.token_id == 30
    assert found.is_finite
    assert {token for token, _ in found.top} == {2, 11}, "what the model says is told as it is"
    greedy = Sampler(Sampling(3), ())
    for token in (5, 2, 11):
        greedy.commit(token)
    greedy.take_back([2, 11])
    greedy.take_back([5])
    assert greedy.banned == [5], "places behind are forgotten"
    assert drawn(greedy, logits).token_id == 2
