"""Drawing tokens: distributions, seeds, penalties and the report of log-probabilities."""

from __future__ import annotations

import pytest
import torch

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.engine.sampling import LEAST_LOGPROB, Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def draws(sampling: Sampling, n: int, prompt: tuple[int, ...] = ()) -> list[int]:
    sampler = Sampler(sampling, prompt)
    return [sampler.draw(LOGITS) for _ in range(n)]


def test_greedy_takes_the_largest_and_ignores_seed_and_penalty() -> None:
    assert draws(Sampling(1, temperature=0, freq_penalty=9, seed=5), 20) == [0] * 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    n = 6000
    counts = torch.bincount(torch.tensor(draws(Sampling(1, temperature=temperature, seed=1), n)), minlength=5) / n
    assert torch.allclose(counts, (LOGITS / temperature).softmax(-1).float(), atol=0.02)


def test_the_seed_decides_and_nothing_else() -> None:
    one, same, other = (draws(Sampling(1, temperature=1.0, seed=s), 40) for s in (3, 3, 4))
    torch.rand(1000)
    assert one == same == draws(Sampling(1, temperature=1.0, seed=3), 40)
    assert one != other


def test_the_penalty_counts_prompt_and_output() -> None:
    """After the temperature: logits / T − penalty × count (contract 3.5)."""
    strong = Sampling(1, temperature=0.5, freq_penalty=1000.0, seed=0)
    assert set(draws(strong, 3, prompt=(0, 0))) == {1, 2, 3}  # 0 was in the prompt, each draw blocks itself
    lenient = draws(Sampling(1, temperature=0.5, freq_penalty=-1000.0, seed=0), 5, prompt=(3,))
    assert lenient == [3] * 5


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-6, 1e6])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    drawn = draws(Sampling(1, temperature=temperature, seed=0), 50)
    assert set(drawn) == {0} if temperature < 1 else len(set(drawn)) > 3


def test_logprobs_are_bounded_below_for_json() -> None:
    sampler = Sampler(Sampling(1, n_logprobs=5), ())
    logits = torch.tensor([500.0, 0.0, 0.0, 0.0, 0.0])
    logprob, top = sampler.logprobs(logits, 3)
    assert logprob == LEAST_LOGPROB
    assert top[0] == (0, 0.0)
    assert all(value >= LEAST_LOGPROB for _, value in top)
    assert Sampler(Sampling(1), ()).logprobs(logits, 3) == (None, ())
