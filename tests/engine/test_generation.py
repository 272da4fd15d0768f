"""Steered decoding with a cache against a plain Hugging Face loop without one, token for token."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import BY_METHOD, Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.edits.select import Selection
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from neuronpedia_inference.points import WRITABLE, Point
from tests import models
from tests.engine.engines import engine

METHODS = tuple(BY_METHOD.values())
PROMPT = (0, 72, 105, 44, 80, 33, 61)
N_TOKENS = 24
LAYER = 1


def run(built: ModelEngine, rows: list[RowSpec]) -> list[list[RowStep]]:
    """Every row's steps."""
    out: list[list[RowStep]] = [[] for _ in rows]
    lane = built.lane
    with torch.inference_mode():
        steps = lane.prefill([(RowId(0, place), spec) for place, spec in enumerate(rows)])
        while steps:
            for step in steps:
                out[step.row.place].append(step)
            steps = lane.decode() if lane.rows else []
    return out


def ids(steps: list[RowStep]) -> list[int]:
    return [step.token_id for step in steps]


def vector(family: str, place: str) -> torch.Tensor:
    width = engine(family).width(Point(LAYER, place))
    return torch.randn(width, generator=torch.Generator().manual_seed(width + len(place)))


def coefficient(family: str, place: str, method: Do, direction: torch.Tensor) -> float:
    """Large against what is there, so that the control differs."""
    hidden = models.read(models.model(family), family, PROMPT, LAYER, place)
    projection = hidden @ (direction / direction.norm())
    if method is Do.ADD:
        return 2 * float(hidden.norm(dim=-1).mean() / direction.norm())
    if method is Do.ORTHOGONAL:
        return -40.0
    return float(projection.min()) - 4 * float(hidden.norm(dim=-1).mean())


@pytest.mark.parametrize(("family", "place"), models.with_places(WRITABLE))
@pytest.mark.parametrize("method", METHODS)
def test_steering_equals_the_formula_applied_by_hand(family: str, place: str, method: Do) -> None:
    direction = vector(family, place)
    size = coefficient(family, place, method, direction)
    steering = RowEdit(Point(LAYER, place), direction, size, method)
    sampling = Sampling(N_TOKENS)
    steered, plain = run(engine(family), [RowSpec(PROMPT, sampling, (steering,)), RowSpec(PROMPT, sampling)])
    net = models.model(family)
    with models.hooked(net, family, LAYER, place, models.formula(method, direction, size)):
        assert ids(steered) == models.greedy(net, PROMPT, N_TOKENS)
    assert ids(plain) == models.greedy(net, PROMPT, N_TOKENS)
    assert ids(steered) != ids(plain)


def test_a_cap_is_a_cap_and_not_an_addition() -> None:
    """Above every projection the cap changes nothing; adding as much would."""
    direction = vector("llama", "hook_resid_post")
    rows = [
        RowSpec(PROMPT, Sampling(N_TOKENS), (RowEdit(Point(LAYER, "hook_resid_post"), direction, 1e4, method),))
        for method in (Do.CAP, Do.ADD)
    ]
    capped, added, plain = run(engine("llama"), [*rows, RowSpec(PROMPT, Sampling(N_TOKENS))])
    assert ids(capped) == ids(plain) != ids(added)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_steers_at_several_points_compose(family: str) -> None:
    """Two at one hook in request order, one at each of the hooks that feed resid_mid, and another layer's."""
    steers = [
        RowEdit(Point(1, "hook_resid_post"), vector(family, "hook_resid_post"), 3.0, Do.ADD),
        RowEdit(Point(1, "hook_resid_post"), vector(family, "hook_resid_pre"), -2.0, Do.ORTHOGONAL),
        RowEdit(Point(1, "hook_resid_mid"), vector(family, "hook_resid_mid"), -5.0, Do.ORTHOGONAL),
        RowEdit(Point(1, "hook_attn_out"), vector(family, "hook_attn_out"), 2.0, Do.ADD),
        RowEdit(Point(1, "hook_resid_pre"), vector(family, "hook_resid_pre"), 2.0, Do.ADD),
        RowEdit(Point(0, "hook_mlp_out"), vector(family, "hook_mlp_out"), 1.5, Do.ADD),
    ]
    got, plain = run(engine(family), [RowSpec(PROMPT, Sampling(12), tuple(steers)), RowSpec(PROMPT, Sampling(12))])
    net = models.model(family)
    # Torch runs hooks of one module in the order of registration: attn_out is edited before it enters resid_mid.
    with ExitStack() as stack:
        for s in (steers[i] for i in (0, 1, 3, 4, 2, 5)):
            edit = models.formula(s.do, s.vector, s.amount)
            stack.enter_context(models.hooked(net, family, s.point.layer, s.point.place, edit))
        assert ids(got) == models.greedy(net, PROMPT, 12) != ids(plain)


def test_untouched_prompt_positions_are_left_alone_and_generated_ones_are_not() -> None:
    direction = vector("llama", "hook_resid_post")
    skipped = (0, 3, 4)
    elsewhere = Selection(but=(Selection(positions=skipped),))
    steering = RowEdit(Point(LAYER, "hook_resid_post"), direction, 0.7, Do.ADD)
    masked, full = run(
        engine("llama"),
        [
            RowSpec(PROMPT, Sampling(N_TOKENS), (replace(steering, on=elsewhere),)),
            RowSpec(PROMPT, Sampling(N_TOKENS), (steering,)),
        ],
    )
    keep = torch.ones(1, len(PROMPT) + N_TOKENS, 1)
    keep[0, list(skipped)] = 0
    net = models.model("llama")
    with models.hooked(net, "llama", LAYER, "hook_resid_post", lambda h: h + 0.7 * direction * keep[:, : h.shape[1]]):
        assert ids(masked) == models.greedy(net, PROMPT, N_TOKENS)
    assert ids(masked) != ids(full)


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    rows = [
        RowSpec(PROMPT, Sampling(10, temperature=0.8, seed=7)),
        RowSpec(PROMPT, Sampling(16, temperature=0.8, seed=8, freq_penalty=0.5)),
        RowSpec(
            PROMPT,
            Sampling(13),
            (RowEdit(Point(0, "hook_resid_post"), vector("gpt2", "hook_resid_post"), 2.0, Do.ADD),),
        ),
    ]
    together = run(engine("gpt2"), rows)
    for row, steps in zip(rows, together, strict=True):
        assert ids(run(engine("gpt2"), [row])[0]) == ids(steps)
    assert [len(steps) for steps in together] == [10, 16, 13]
    assert [steps[-1].finish_reason for steps in together] == ["length"] * 3


def test_a_row_stops_at_a_stop_id_and_the_others_go_on() -> None:
    plain = ids(run(engine("llama"), [RowSpec(PROMPT, Sampling(N_TOKENS))])[0])
    stop = plain[5]
    first = plain.index(stop)
    direction = vector("llama", "hook_resid_post")
    steering = RowEdit(Point(LAYER, "hook_resid_post"), direction, 4.0, Do.ADD)
    stopped, other = run(
        engine("llama", (stop,)),
        [RowSpec(PROMPT, Sampling(N_TOKENS)), RowSpec(PROMPT, Sampling(N_TOKENS), (steering,))],
    )
    assert ids(stopped) == plain[: first + 1]
    assert stopped[-1].finish_reason == "stop"
    expected = ids(run(engine("llama"), [RowSpec(PROMPT, Sampling(N_TOKENS), (steering,))])[0])
    assert ids(other) == expected[: len(other)]
    assert len(other) > len(stopped)


def test_logprobs_are_of_the_raw_logits() -> None:
    """Temperature and penalty shape the draw, not the report."""
    sampling = Sampling(6, temperature=1.7, freq_penalty=1.0, seed=3, n_logprobs=4)
    steps = run(engine("llama"), [RowSpec(PROMPT, sampling)])[0]
    tokens = [*PROMPT, *ids(steps)]
    with torch.no_grad():
        logits = models.model("llama")(torch.tensor([tokens])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    for step, row in zip(steps, expected, strict=True):
        assert step.logprob == pytest.approx(float(row[step.token_id]), abs=1e-4)
        values, indices = row.topk(4)
        assert [i for i, _ in step.top] == indices.tolist()
        assert [v for _, v in step.top] == pytest.approx(values.tolist(), abs=1e-4)
