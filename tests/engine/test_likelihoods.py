"""Log-probabilities of given tokens in small models of many families, against Hugging Face's own logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuronpedia_inference.domain import Likelihood
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.questions.likelihoods import Likelihoods
from tests import models
from tests.allocation import allocated_at_the_peak
from tests.engine.engines import engine
from tests.engine.test_states import FAMILIES, ended, tokens

TEXTS = ([0, 6, 7, 8, 9], [12, 3], [0, 40, 41, 42, 7] * 4)
N_GIVEN = (2, 1, 17)


def question(family: str, n_top: int = 3) -> Likelihoods:
    texts = [tokens(ids) for ids in TEXTS]
    return Likelihoods(texts, N_GIVEN, engine(family).n_layers - 1, models.VOCAB_SIZE, n_top)


def answered(asked: Likelihoods, family: str) -> list[Likelihood]:
    built: Any = engine(family)
    with torch.inference_mode():
        captured = built.capture([prompt.ids for prompt in asked.prompts], asked.points)
        return ended(asked.reduce(captured, SimpleNamespace(readout=built.readout)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_the_models_logits(family: str) -> None:
    asked, net = question(family), models.model(family)
    if engine(family).verdict.no_lens_because:
        with pytest.raises(InvalidRequest, match="This model has no logit lens"):
            asked.check(engine(family), models.VOCAB_SIZE)
        return
    asked.check(engine(family), models.VOCAB_SIZE)
    for ids, n_given, found in zip(TEXTS, N_GIVEN, answered(asked, family), strict=True):
        with torch.no_grad():
            logprobs = net(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)[n_given - 1 : -1]
        expected = logprobs[range(len(logprobs)), list(ids[n_given:])].numpy()
        tolerance = 1e-4 * float(logprobs.abs().max())
        np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=tolerance)
        top = logprobs.topk(3)
        np.testing.assert_allclose(found.top, top.values.numpy(), rtol=0, atol=tolerance)
        np.testing.assert_array_equal(found.is_likeliest, expected >= top.values[:, 0].numpy())
        with pytest.raises(AssertionError):  # the tolerance can tell one place from the next
            np.testing.assert_allclose(np.roll(found.top[:, 0], 1) + 1e-2, top.values[:, 0].numpy(), atol=tolerance)


def test_scoring_stays_within_what_it_says_it_takes() -> None:
    asked = question("llama")
    captured = engine("llama").capture([prompt.ids for prompt in asked.prompts], asked.points)
    weights: Any = SimpleNamespace(readout=engine("llama").readout)
    assert 0 < allocated_at_the_peak(lambda: ended(asked.reduce(captured, weights))) <= asked.n_bytes


def test_a_text_needs_something_given_and_something_behind_it() -> None:
    for n_given in (0, 2):
        asked = Likelihoods([tokens([3, 4])], [n_given], 2, models.VOCAB_SIZE)
        with pytest.raises(InvalidRequest, match=f"Text 0 has 2 tokens, of which {n_given} are given"):
            asked.check(engine("llama"), models.VOCAB_SIZE)
