"""What passes inside small models of many families, against Hugging Face's eager attention and hooks by hand."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuronpedia_inference.domain import Positions, Tokens
from neuronpedia_inference.errors import EngineFailed, InvalidRequest, UnknownPoint
from neuronpedia_inference.points import PATTERN, RESID_POST, Point
from neuronpedia_inference.questions.states import HeadPattern, States
from tests import architectures, models
from tests.engine.engines import engine

assert architectures.CONFIGS  # registers them
T = TypeVar("T")
PROMPTS = ([0, 6, 7, 8, 9], [12], [0, 40, 41, 42, 7] * 4)
FAMILIES = (
    *models.CONFIGS,
    *("gemma", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_moe", "mixtral", "mistral", "phi3", "olmo2", "olmo3"),
    *("smollm3", "deepseek_v3", "opt", "cohere", "cohere2", "qwen3_5", "bloom", "gptj"),
)
NO_PATTERN = ("bloom", "gptj", "qwen3_5")
"""Two attend by functions of their own; the third has linear attention, and heads with a gate behind their pattern."""


def tokens(ids: Sequence[int]) -> Tokens:
    return Tokens(tuple(ids), tuple(map(str, ids)), tuple(i == 0 for i in ids), has_bos=ids[0] == 0)


def answered(question: Any, family: str) -> Any:
    """As the runtime asks, without its worker."""
    built = engine(family)
    question.check(built, models.VOCAB_SIZE)
    with torch.inference_mode():
        captured = built.capture([prompt.ids for prompt in question.prompts], question.points)
        return ended(question.reduce(captured, None))


def reduced(question: Any, hidden: Mapping[Point, torch.Tensor]) -> Any:
    """Of one prompt; no weights are asked for."""
    return ended(question.reduce([hidden], None))


def ended(steps: Generator[Any, Any, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def patterns(family: str, ids: Sequence[int]) -> list[torch.Tensor]:
    """Per layer [head, query, key]: of a model of its own whose attention makes its pattern."""
    net: Any = models.model(family)
    config = copy.deepcopy(net.config)
    eager: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(net.state_dict())
    with torch.no_grad():
        found = eager(torch.tensor([list(ids)]), output_attentions=True, use_cache=False).attentions
    return [pattern[0] for pattern in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_where_heads_look(family: str) -> None:
    ids = PROMPTS[2]
    n = len(ids)
    expected = [] if family in NO_PATTERN else patterns(family, ids)
    for layer in range(3):
        if not expected:
            with pytest.raises(UnknownPoint, match=rf"blocks\.{layer}\.attn\.hook_pattern"):
                answered(HeadPattern(tokens(ids), layer, 0), family)
            continue
        for head in (0, 3):
            found = answered(HeadPattern(tokens(ids), layer, head), family)
            wanted = expected[layer][head]
            assert found.largest == pytest.approx(float(wanted[1:, 1:].max()), abs=1e-4)
            dense = torch.zeros(n, n)
            dense[found.queries, found.keys] = torch.from_numpy(found.weights)
            eighth = wanted.topk(8).values[:, -1:].clamp(min=0.005)
            assert dense[wanted > eighth + 1e-4] == pytest.approx(wanted[wanted > eighth + 1e-4], abs=1e-4)
            assert not dense[wanted < eighth - 1e-4].any()
            assert (np.diff(found.queries * n + found.keys) > 0).all()
            assert not dense.allclose(expected[layer][1], atol=1e-3)  # another head looks elsewhere


def test_a_head_that_its_layer_lacks_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"Invalid head: 4\. Layer 1 has 4\."):
        answered(HeadPattern(tokens(PROMPTS[0]), 1, 4), "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_at_all_positions_at_the_last_and_their_mean(family: str) -> None:
    """Several texts of one request share a pass; each has what it has alone."""
    batch = [tokens(ids) for ids in PROMPTS]
    points = [Point(2, RESID_POST), Point(0, RESID_POST)]
    net = models.model(family)
    wanted = [{p: models.read(net, family, ids, p.layer, p.place) for p in points} for ids in PROMPTS]
    ways: dict[Positions, Any] = {
        "all": lambda hidden, ids: hidden,
        "last": lambda hidden, ids: hidden[-1:],
        "mean": lambda hidden, ids: hidden[torch.tensor(ids) != 0].mean(0, keepdim=True),
    }
    for positions, way in ways.items():
        found = answered(States(batch, points, positions, 0), family)
        for ids, states, hidden in zip(PROMPTS, found, wanted, strict=True):
            assert list(states) == points
            for point in points:
                expected = way(hidden[point], ids)
                assert states[point].dtype == np.float32
                assert states[point].shape == expected.shape
                close = 1e-4 * float(hidden[point].abs().max())
                assert states[point] == pytest.approx(expected.numpy(), abs=close)


def test_a_mean_needs_a_token_that_is_not_special() -> None:
    with pytest.raises(InvalidRequest, match="Text 1 has no tokens beside special ones"):
        answered(States([tokens(PROMPTS[0]), tokens([0, 0])], [Point(0, RESID_POST)], "mean", 0), "llama")


def test_what_is_not_finite_is_no_answer() -> None:
    prompt, point = tokens(PROMPTS[0]), Point(1, RESID_POST)
    broken = {point: torch.full((5, 4), torch.inf), Point(1, PATTERN): torch.full((2, 5, 5), torch.nan)}
    for question in (States([prompt], [point], "last", 4), HeadPattern(prompt, 1, 0)):
        with pytest.raises(EngineFailed, match=r"not finite at 'blocks\.1\."):
            reduced(question, broken)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_one_number_that_is_not_finite_is_found_among_many(bad: float, precision: Any) -> None:
    prompt, point = tokens(range(300)), Point(1, RESID_POST)
    hidden = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    question = States([prompt], [point], "all", hidden.numel(), precision)
    found = reduced(question, {point: hidden})[0][point]
    assert (found.shape, found.flags.writeable) == ((300, 32), False)
    hidden[177, 5] = bad
    with pytest.raises(EngineFailed, match=r"not finite at 'blocks\.1\."):
        reduced(question, {point: hidden})


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_that_half_precision_has_not_are_refused(sign: int) -> None:
    """Up to 65,519 numbers are rounded to 65,504, the largest that it has."""
    prompt, point = tokens(PROMPTS[0]), Point(1, RESID_POST)
    hidden = torch.zeros(len(prompt), 32)
    hidden[2, 3] = sign * 65_519
    question = States([prompt], [point], "all", hidden.numel(), "float16")
    [states] = reduced(question, {point: hidden})
    assert (states[point].dtype, states[point][2, 3]) == (np.float16, sign * 65_504)
    hidden[2, 3] = sign * 65_520
    with pytest.raises(InvalidRequest, match="too large for float16"):
        reduced(question, {point: hidden})
