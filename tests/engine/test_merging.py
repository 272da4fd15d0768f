"""Rows that decode in one batch against the same rows alone.

They differ in prompt, length, seed, penalty, vector, strength, hook, method and mask, and join and leave between steps.
The control is plain Hugging Face without a cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from neuronpedia_inference.costs import NO_GRID
from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import BY_METHOD, Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.edits.select import Selection
from neuronpedia_inference.engine.cache import RowCache
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from neuronpedia_inference.engine.solo import SoloLane
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.points import WRITABLE, Point
from tests import models
from tests.engine.engines import engine
from tests.host_reads import HostReads

METHODS = tuple(BY_METHOD.values())
PROMPTS = [
    (0, 72, 105, 44, 80, 33, 61, 90, 17),
    (0,),
    (0, 200, 14, 99),
    (0, 72, 105, 44, 80, 33, 61, 90, 17, 41, 42, 43, 44, 45, 46, 47),
    (0, 5, 6),
    (0, 81, 82, 83, 84, 85, 86),
]


def steering(family: str, place: str, method: Do, layer: int, seed: int) -> RowEdit:
    """Strong against what is there, so that the control differs."""
    width = engine(family).width(Point(layer, place))
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    hidden = models.read(models.model(family), family, PROMPTS[0], layer, place)
    scale = float(hidden.norm(dim=-1).mean())
    size = {
        Do.ADD: 2 * scale / float(vector.norm()),
        Do.ORTHOGONAL: -30.0,
        Do.CAP: -4 * scale,
    }[method]
    return RowEdit(Point(layer, place), vector, size, method)


def steered_rows(
    family: str, places: Sequence[str], layers: Sequence[int] = (0, 1, 2), strength: float = 1
) -> list[RowSpec]:
    """Every method at every place, in other layers, over prompts of other lengths; two rows are not steered.

    strength: times that of `steering`.
    """
    combinations = [(place, method) for place in places for method in METHODS]
    rows = [
        RowSpec(
            PROMPTS[number % len(PROMPTS)],
            Sampling(6 + 5 * number % 11),
            (steering(family, place, method, layers[number % len(layers)], number),),
        )
        for number, (place, method) in enumerate(combinations)
    ]
    for number, row in enumerate(rows):
        stronger = (replace(s, amount=s.amount * strength) for s in row.edits)
        rows[number] = replace(row, edits=tuple(stronger))
    plain = [RowSpec(PROMPTS[3], Sampling(14)), RowSpec(PROMPTS[1], Sampling(9))]
    return [plain[0], *rows, plain[1]]


def alone(family: str, row: RowSpec) -> list[int]:
    """A plain greedy loop over the whole text, hooks written by hand."""
    net = models.model(family)
    with ExitStack() as stack:
        for s in row.edits:
            edit = models.formula(s.do, s.vector, s.amount)
            stack.enter_context(models.hooked(net, family, s.point.layer, s.point.place, edit))
        return models.greedy(net, row.prompt_ids, row.sampling.max_new_tokens)


def staggered(lane: Lane | SoloLane, rows: Sequence[RowSpec], at_once: int) -> list[list[RowStep]]:
    """Rows join `at_once` at a time, with two steps of the batch in between."""
    out: dict[int, list[RowStep]] = defaultdict(list)

    def note(steps: Sequence[RowStep]) -> None:
        for step in steps:
            out[step.row.job].append(step)

    waiting = [(RowId(number, 0), row) for number, row in enumerate(rows)]
    with torch.inference_mode():
        while waiting or lane.rows:
            if waiting:
                note(lane.prefill(waiting[:at_once]))
                del waiting[:at_once]
            for _ in range(2):
                if lane.rows:
                    note(lane.decode())
    return [out[number] for number in range(len(rows))]


def ids(steps: Sequence[RowStep]) -> list[int]:
    return [step.token_id for step in steps]


@pytest.fixture(autouse=True)
def lanes_are_left_empty() -> Iterator[None]:
    yield
    for family in models.CONFIGS:
        assert not engine(family).lane.rows


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize("at_once", [1, 3])
def test_merged_rows_equal_rows_alone(family: str, at_once: int) -> None:
    assert not engine(family).unmerged_because
    rows = steered_rows(family, [p for f, p in models.with_places(WRITABLE) if f == family])
    merged = staggered(engine(family).lane, rows, at_once)
    for row, steps in zip(rows, merged, strict=True):
        assert ids(steps) == alone(family, row), row.edits
        if row.edits:
            assert ids(steps) != alone(family, replace(row, edits=()))
        assert steps[-1].finish_reason == "length"


@pytest.mark.parametrize("family", models.CONFIGS)
def test_sampled_rows_draw_the_same_merged_as_alone(family: str) -> None:
    """Temperature, penalty, seed and log-probabilities belong to the row."""
    steer = steering(family, "hook_resid_post", Do.ADD, 1, 5)
    rows = [
        RowSpec(
            PROMPTS[number],
            Sampling(
                8 + number, temperature=0.7 + 0.1 * number, freq_penalty=0.4 * (number % 2), seed=number, n_logprobs=3
            ),
            (replace(steer, amount=steer.amount * number / 4),) if number % 3 else (),
        )
        for number in range(6)
    ]
    merged = staggered(engine(family).lane, rows, 2)
    for row, steps in zip(rows, merged, strict=True):
        (single,) = staggered(engine(family).lane, [row], 1)
        assert ids(single) == ids(steps)
        assert [s.logprob for s in steps] == pytest.approx([s.logprob for s in single], abs=1e-4)
        for one, other in zip(steps, single, strict=True):
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def test_the_host_reads_once_a_step_for_all_rows() -> None:
    samplings = (
        Sampling(6),
        Sampling(6, temperature=1.0, freq_penalty=0.3),
        Sampling(6, temperature=0.5, n_logprobs=3),
    )
    lane = engine("llama").lane
    with torch.inference_mode():
        lane.prefill([(RowId(n, 0), RowSpec(PROMPTS[n], one)) for n, one in enumerate(samplings)])
        for _ in range(3):
            with HostReads() as reads:
                assert len(lane.decode()) == 3
            assert reads.names == ["tolist"]
        lane.drop(set(lane.rows))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_positions_left_alone_are_those_of_the_row(family: str) -> None:
    """Rows of a padded prefill with other masks, each against a hand-masked hook."""
    steer = steering(family, "hook_resid_post", Do.ADD, 1, 3)
    masks = [(0, 3), (0,), (1, 2)]
    rows = [
        RowSpec(PROMPTS[n], Sampling(8), (replace(steer, on=Selection(but=(Selection(positions=mask),))),))
        for n, mask in enumerate(masks)
    ]
    merged = staggered(engine(family).lane, rows, 3)
    net = models.model(family)
    for row, mask, steps in zip(rows, masks, merged, strict=True):
        keep = torch.ones(1, 64, 1)
        keep[0, list(mask)] = 0
        add = steer.amount * steer.vector
        with models.hooked(net, family, 1, "hook_resid_post", lambda h, k=keep, a=add: h + a * k[:, : h.shape[1]]):
            assert ids(steps) == models.greedy(net, row.prompt_ids, 8)


@pytest.mark.parametrize("family", models.CONFIGS)
def test_a_row_that_is_dropped_leaves_the_others_as_they_were(family: str) -> None:
    rows = [RowSpec(prompt, Sampling(12)) for prompt in PROMPTS[:4]]
    lane = engine(family).lane
    out: dict[int, list[int]] = defaultdict(list)
    with torch.inference_mode():
        steps = lane.prefill([(RowId(n, 0), row) for n, row in enumerate(rows)])
        while steps:
            for step in steps:
                out[step.row.job].append(step.token_id)
            if len(out[0]) == 4:
                lane.drop({RowId(0, 0), RowId(2, 0), RowId(77, 0)})
            steps = lane.decode() if lane.rows else []
    assert [len(out[n]) for n in range(4)] == [4, 12, 4, 12]
    for n, row in enumerate(rows):
        assert out[n] == alone(family, row)[: len(out[n])]


def test_a_row_that_overflows_ends_alone_and_its_slot_is_clean_for_the_next() -> None:
    built = engine("llama")
    huge = RowEdit(Point(1, "hook_resid_post"), torch.full((32,), 1e30), 1e30, Do.ADD)
    rows = [
        RowSpec(PROMPTS[3], Sampling(9), (huge,)),
        RowSpec(PROMPTS[0], Sampling(9)),
        RowSpec(PROMPTS[4], Sampling(9)),
    ]
    burst, plain, later = staggered(built.lane, rows, 2)
    assert isinstance(burst[0].error, InvalidRequest)
    assert len(burst) == 1
    assert ids(plain) == alone("llama", rows[1])
    assert ids(later) == alone("llama", rows[2])


def test_a_failing_prefill_leaves_the_running_rows_as_they_were() -> None:
    built = engine("llama")
    first = RowSpec(PROMPTS[0], Sampling(9))
    bad = RowSpec((0, 10**6), Sampling(9))
    lane = built.lane
    with torch.inference_mode():
        steps = lane.prefill([(RowId(0, 0), first)])
        with pytest.raises(IndexError):
            lane.prefill([(RowId(1, 0), bad)])
        while lane.rows:
            steps += lane.decode()
    assert ids(steps) == alone("llama", first)


def test_a_model_whose_rows_differ_runs_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that hides nothing is found by the probe, and then nothing is merged."""
    monkeypatch.setattr(RowCache, "masks", lambda self: None)
    with torch.inference_mode(False):
        built = ModelEngine(models.model("gemma2"), model_id="gemma2", name="gemma2", stop_ids=())
    assert "different" in built.unmerged_because
    rows = steered_rows("gemma2", ["hook_resid_post"])
    lane = built.lane
    assert isinstance(lane, SoloLane)
    for row, steps in zip(rows, staggered(lane, rows, 2), strict=True):
        assert ids(steps) == alone("gemma2", row)


def test_slots_are_reused_and_given_back() -> None:
    built = engine("gpt2")
    rows = [RowSpec(PROMPTS[n % 6], Sampling(3 + n)) for n in range(6)]
    lane = built.lane
    assert isinstance(lane, Lane)
    assert isinstance(lane.memory, RowCache)
    staggered(lane, rows, 2)
    assert lane.memory.grid == NO_GRID
    assert all(layer.keys is None for layer in lane.memory.layers)  # pyright: ignore[reportAttributeAccessIssue]
