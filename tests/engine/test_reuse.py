"""What is kept of prompts changes no number and no token, and is used where it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.edits.select import Phase, Selection
from neuronpedia_inference.engine.cache import MaskForm
from neuronpedia_inference.engine.engine import n_bytes
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowId, RowSpec, RowStep, Watch
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.points import Point
from neuronpedia_inference.recent import Recent
from neuronpedia_inference.scheduler.jobs import CaptureWork, Steps
from neuronpedia_inference.scheduler.policy import Limits
from neuronpedia_inference.scheduler.worker import Worker
from neuronpedia_inference.watches.readings import VectorReading, tracing
from tests import models
from tests.edits_by_hand import Hand, When, sae
from tests.engine.engines import engine
from tests.engine.test_merging import alone, ids, steering

PROMPT = tuple(3 + 7 * n % 200 for n in range(30))
BUDGET = 2**22


def lane_of(family: str, recent: Recent) -> Lane:
    return Lane.merging(engine(family).decoder, MaskForm.ADDITIVE, None, recent)


def run(lane: Lane, *specs: RowSpec) -> tuple[list[list[int]], int]:
    """Tokens of every row, and how many prompt tokens were run."""
    steps, n_run = run_steps(lane, *specs)
    return [ids([step for step in steps if step.row.job == n]) for n in range(len(specs))], n_run


def run_steps(lane: Lane, *specs: RowSpec) -> tuple[list[RowStep], int]:
    with torch.inference_mode():
        joining = lane.begin([(RowId(n, 0), spec) for n, spec in enumerate(specs)])
        n_run = joining.n_tokens
        while not joining.is_done:
            joining.advance(8)
        steps = joining.join()
        while lane.rows:
            steps += lane.decode()
    return steps, n_run


@pytest.mark.parametrize("family", models.CONFIGS)
def test_the_next_turn_runs_only_what_is_new(family: str) -> None:
    lane = lane_of(family, Recent(BUDGET, n_bytes))
    first = RowSpec(PROMPT, Sampling(9))
    (answer,), n_run = run(lane, first)
    assert n_run == len(PROMPT)
    assert answer == alone(family, first)
    second = RowSpec((*PROMPT, *answer, 5, 6, 7), Sampling(9))
    other = RowSpec((*PROMPT[:20], 9, 9, 9), Sampling(9))
    new = RowSpec((9, *PROMPT), Sampling(9))
    found, n_run = run(lane, second, other, new)
    assert found == [alone(family, spec) for spec in (second, other, new)]
    assert n_run == (1 + 3) + 3 + 31, "of the answer, all but the last token; of what begins alike, what is alike"
    (again,), n_run = run(lane, second)
    assert again == found[0]
    assert n_run == 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_steered_positions_are_taken_over_by_the_same_steering_alone(family: str) -> None:
    steered = (steering(family, "hook_resid_post", Do.ADD, 1, 1),)
    stronger = (replace(steered[0], amount=2 * steered[0].amount),)
    lane = lane_of(family, Recent(BUDGET, n_bytes))
    plain = RowSpec(PROMPT, Sampling(9, n_logprobs=1))
    rows = [plain, replace(plain, edits=steered), replace(plain, edits=stronger)]
    for left_out in ((4, 20), (20,)):
        on = Selection(but=(Selection(positions=left_out),))
        rows.append(replace(plain, edits=(replace(steered[0], on=on),)))
    expected = [alone(family, row) for row in rows]
    first_logprobs = set()
    n_runs = []
    for row, tokens in [*zip(rows, expected, strict=True)] * 2:
        fresh, _ = run_steps(lane_of(family, Recent.nothing()), row)
        steps, n_run = run_steps(lane, row)
        assert ids(steps) == ids(fresh) == tokens
        assert [step.logprob for step in steps] == pytest.approx([step.logprob for step in fresh], abs=1e-4)
        first_logprobs.add(round(steps[0].logprob or 0, 3))
        n_runs.append(n_run)
    assert len(first_logprobs) >= 3, "the controls differ"
    assert n_runs == [30, 30, 30, 30, 10, *[1] * 5], "up to position 20 the last is like the second"


def test_a_row_that_failed_leaves_nothing() -> None:
    lane = lane_of("llama", recent := Recent(BUDGET, n_bytes))
    with torch.inference_mode():
        too_strong = replace(steering("llama", "hook_resid_post", Do.ADD, 1, 1), amount=1e39)
        joined = lane.prefill([(RowId(0, 0), RowSpec(PROMPT, Sampling(9), (too_strong,)))])
    assert joined[0].error is not None
    assert not list(recent)


turns = st.lists(
    st.tuples(
        st.lists(st.integers(0, 15), min_size=1, max_size=4),
        st.integers(0, 30),
        st.lists(st.integers(3, 5), max_size=6),
        st.integers(1, 5),
    ),
    min_size=2,
    max_size=5,
)


def watched(*, before: bool = False, width: int = 32) -> Watch:
    return engine("llama").watch(Point(1, "hook_resid_post"), VectorReading(width), before=before)


def proof(edits: Sequence[RowEdit]) -> tuple[Watch, ...]:
    return tuple(engine("llama").watch(point, one, before=True, proves=True) for point, one in tracing(edits).items())


@cache
def kinds() -> list[dict[str, Any]]:
    """What may act on a row or read it: vectors, a feature set on some positions or on a condition, watches on both
    sides of edits, what edits say of themselves, and what proves that they acted."""
    of, place = sae("jumprelu"), "hook_resid_post"
    adds = [(steering("llama", place, Do.ADD, n, n),) for n in range(2)]
    late = (Hand(Do.CLAMP, 1, place, 4.0, of=of, index=3, on=Selection(start=4)).resolved(),)
    after = Selection(Phase.GENERATED)
    generated = (Hand(Do.CLAMP, 1, place, 5.0, of=of, index=3, on=after).resolved(),)
    stronger = (replace(generated[0], amount=9.0), replace(adds[1][0], on=after))
    when = When(of, 5, 0, place, above=0.5, n_tokens=3)
    waiting = (Hand(Do.ADD, 1, place, 3.0, of=of, index=7, when=when).resolved(),)
    edited = [adds[0], adds[1], late, generated, stronger, waiting, (*adds[0], *late)]
    seen = [
        {"edits": edits, "watches": (watched(before=True), *proof(edits)), "tells_edits": True}
        for edits in (late, generated, stronger, waiting)
    ]
    proven = [{"edits": edits, "watches": proof(edits)} for edits in (late, generated, stronger)]
    return [*({"edits": edits} for edits in edited), *seen, *proven, {"watches": (watched(),)}, {}]


@settings(max_examples=25)
@given(turns, st.sampled_from([0, 20_000, 60_000, BUDGET]))
def test_no_token_changes_whatever_is_kept_and_the_budget_holds(
    program: Sequence[tuple[list[int], int, list[int], int]], budget: int
) -> None:
    """Texts that begin like earlier ones, cut anywhere, one or several at once, edited in some of many ways, watched,
    or left alone: tokens and every number that is read are those of a row run alone."""
    recent: Recent[Any, Any] = Recent(budget, n_bytes)
    lane = lane_of("llama", recent)
    text = PROMPT
    for which, cut, more, n_new in program:
        specs = [RowSpec((*text[:cut], *more, 8), Sampling(n_new, n_logprobs=1), **kinds()[kind]) for kind in which]
        steps, _ = run_steps(lane, *specs)
        for number, spec in enumerate(specs):
            fresh, _ = run_steps(lane_of("llama", Recent.nothing()), spec)
            expect_alike([step for step in steps if step.row.job == number], fresh)
        found = [token for token in ids([step for step in steps if step.row.job == 0]) if token != NO_TOKEN]
        text = (*specs[0].prompt_ids, *found, *PROMPT)
        assert recent.held_bytes <= budget
        assert recent.held_bytes == sum(n_bytes(recent.get(key)) for key in list(recent))


def expect_alike(steps: Sequence[RowStep], fresh: Sequence[RowStep]) -> None:
    assert ids(steps) == ids(fresh)
    for step, expected in zip(steps, fresh, strict=True):
        assert step.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert (step.numbers is None) == (expected.numbers is None)
        if step.numbers is not None:
            # Sums over 32 numbers in float32, behind cached keys; states are up to 30 in size.
            assert step.numbers == pytest.approx(expected.numbers, abs=1e-3, rel=1e-4)


def test_one_prompt_serves_all_cells() -> None:
    """Strengths, seeds and watches; where edits act on the prompt, cells of the same edit."""
    late, stronger = kinds()[3]["edits"], kinds()[4]["edits"]
    everywhere = kinds()[0]["edits"]
    row = RowSpec(PROMPT, Sampling(3))
    plain = replace(row, watches=(watched(),))
    cells = [
        replace(row, edits=edits, watches=(watched(before=True), *proof(edits)), tells_edits=True)
        for edits in (late, stronger, late)
    ]
    lane = lane_of("llama", Recent(BUDGET, n_bytes))
    steps, n_run = run_steps(lane, plain, *cells)
    assert n_run == len(PROMPT)
    for number, spec in enumerate((plain, *cells)):
        fresh, n_alone = run_steps(lane_of("llama", Recent.nothing()), spec)
        assert n_alone == len(PROMPT)
        expect_alike([step for step in steps if step.row.job == number], fresh)
    _, n_later = run_steps(lane, *cells, plain)
    assert n_later == 1, "what the first of them has read is known, and only the last token runs"
    other = replace(plain, watches=(engine("llama").watch(Point(0, "hook_resid_post"), VectorReading(32)),))
    assert run_steps(lane, other)[1] == len(PROMPT), "what nobody has read has to pass"
    seeds = [
        replace(row, edits=everywhere, sampling=Sampling(3, temperature=1.0, seed=seed, n_logprobs=1))
        for seed in (1, 2, 3)
    ]
    apart = replace(seeds[0], edits=(replace(everywhere[0], amount=3 * everywhere[0].amount),))
    steps, n_run = run_steps(lane, *seeds, apart)
    assert n_run == 2 * len(PROMPT), "steered prompts are others"
    for number, spec in enumerate((*seeds, apart)):
        fresh, _ = run_steps(lane_of("llama", Recent.nothing()), spec)
        expect_alike([step for step in steps if step.row.job == number], fresh)
    firsts = [next(step.logprob for step in steps if step.row.job == number) for number in (0, 3)]
    assert firsts[0] != firsts[1], "the control: they differ"


def test_what_is_kept_of_a_text_holds_no_other_and_is_not_copied_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built, point = engine("llama"), Point(1, "hook_resid_post")
    monkeypatch.setattr(built, "recent", recent := Recent(BUDGET, n_bytes))
    worker = Worker(built, Limits(), n_threads=1, max_wait_s=None, metrics=Metrics())

    def reduce(captured: list[Any]) -> Steps:
        yield None
        return [seen[point] for seen in captured]

    def read(*prompts: Sequence[int]) -> list[torch.Tensor]:
        return worker.submit(CaptureWork(prompts, [point], reduce)).future.result(60)

    try:
        short, _ = read(PROMPT[:9], PROMPT)
        [alone] = read(PROMPT[:7])
    finally:
        worker.close()
    kept: dict[Any, Any] = {text: recent.get((text, point)) for text in (PROMPT[:7], PROMPT[:9], PROMPT)}
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in kept.values())
    assert kept[PROMPT[:7]].data_ptr() == alone.data_ptr(), "it had all of its memory for itself"
    assert torch.equal(kept[PROMPT[:9]], short)
    assert kept[PROMPT[:9]].data_ptr() != short.data_ptr(), "it lay beside the longer one"


def test_a_second_feature_of_a_text_needs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine("llama")
    passes: list[int] = []
    begin = built.begin_capture

    def counted(rows: Sequence[RowSpec], points: Any) -> Any:
        passes.append(len(rows))
        return begin(rows, points)

    monkeypatch.setattr(built, "begin_capture", counted)
    monkeypatch.setattr(built, "recent", recent := Recent(BUDGET, n_bytes))
    worker = Worker(built, Limits(), n_threads=1, max_wait_s=None, metrics=Metrics())

    def read(layer: int, *prompts: Sequence[int]) -> list[torch.Tensor]:
        point = Point(layer, "hook_resid_post")

        def reduce(captured: list[Any]) -> Steps:
            yield None
            return [seen[point].clone() for seen in captured]

        return worker.submit(CaptureWork(prompts, [point], reduce)).future.result(60)

    try:
        first = read(1, PROMPT)
        assert torch.equal(read(1, PROMPT)[0], first[0])
        both = read(1, PROMPT[:9], PROMPT)
        assert torch.equal(both[1], first[0])
        read(0, PROMPT)
        assert passes == [1, 1, 1], "the first; the part that was new; another layer"
        recent.budget_bytes = 0
        read(2, PROMPT)
        read(2, PROMPT)
        assert len(passes) == 5
    finally:
        worker.close()
