"""What runs next and who is let in: pure decisions, over random queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.costs import Demand
from neuronpedia_inference.errors import LimitExceeded, Overloaded
from neuronpedia_inference.scheduler.admission import Admission
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Job, Steps
from neuronpedia_inference.scheduler.policy import Limits, UnderWay, plan_tick

LIMITS = Limits(max_rows=4)


def at_once(run: Callable[[], Any]) -> Callable[[], Steps]:
    """Work that waits for nothing."""

    def steps() -> Steps:
        yield from ()
        return run()

    return steps


def job(
    number: int,
    *,
    generates: bool,
    n_rows: int = 1,
    deadline_s: float | None = None,
    n_prompt: int = 5,
    n_positions: int = 9,
) -> Job:
    generation = GenerateWork(at_once(list), n_rows, n_prompt, n_positions)
    return Job(number, generation if generates else CallWork(at_once(lambda: None)), 0.0, deadline_s)


@st.composite
def queues(draw: Any) -> tuple[list[Job], list[Job]]:
    def some(first: int, *, running: bool) -> list[Job]:
        found = []
        for number in range(draw(st.integers(0, 6))):
            made = job(
                first + number,
                generates=running or draw(st.booleans()),
                n_rows=draw(st.integers(1, 5)),
                deadline_s=draw(st.sampled_from([None, 1.0, 9.0])),
                n_prompt=draw(st.sampled_from([1, 5, 6, 40])),
                n_positions=draw(st.sampled_from([41, 50, 90])),
            )
            if draw(st.integers(0, 4)) == 0:
                made.ticket.cancel()
            found.append(made)
        return found

    return some(0, running=False), some(100, running=True)


def n_rows(jobs: Sequence[Job]) -> int:
    return sum(one.work.n_rows for one in jobs if isinstance(one.work, GenerateWork))


def positions(jobs: Sequence[Job]) -> int:
    return n_rows(jobs) * max(one.work.n_positions for one in jobs if isinstance(one.work, GenerateWork))


@given(queues())
def test_no_job_is_lost_or_taken_twice_and_bounds_hold(jobs: tuple[list[Job], list[Job]]) -> None:
    waiting, running = jobs
    limits = Limits(max_rows=6, max_cache_positions=300, max_prefill_tokens=40)
    tick = plan_tick(waiting, UnderWay(decoding=running), limits, now_s=5.0)
    taken = [*tick.cancelled, *tick.expired, *tick.run, *tick.prefill]
    assert len({j.id for j in taken}) == len(taken)
    assert {j.id for j in taken} <= {j.id for j in (*waiting, *running)}
    assert {j.id for j in tick.cancelled} == {j.id for j in (*waiting, *running) if j.ticket.cancelled}
    assert not any(j.ticket.cancelled for j in (*tick.expired, *tick.run, *tick.prefill))
    assert all(j.deadline_s == 1.0 for j in tick.expired)
    staying = [j for j in running if not j.ticket.cancelled]
    if len(tick.prefill) + len(staying) > 1 and tick.prefill:
        assert n_rows([*staying, *tick.prefill]) <= limits.max_rows
        assert positions([*staying, *tick.prefill]) <= limits.max_cache_positions
    if len(tick.prefill) > 1:
        lengths = [j.work.n_prompt_tokens for j in tick.prefill if isinstance(j.work, GenerateWork)]
        assert n_rows(tick.prefill) * max(lengths) <= limits.max_prefill_tokens
    if tick.prefill:
        ready = [j for j in waiting if isinstance(j.work, GenerateWork) and j not in taken[: -len(tick.prefill)]]
        assert tick.prefill[0] is ready[0]


@given(queues())
def test_everything_ends(jobs: tuple[list[Job], list[Job]]) -> None:
    """Carried out by the book, with generations of three steps, any queue is empty after a bounded number of ticks."""
    waiting, running = jobs
    steps = {j.id: 0 for j in running}
    for _ in range(3 * (len(waiting) + len(running)) + 3):
        tick = plan_tick(waiting, UnderWay(decoding=running), LIMITS, now_s=5.0)
        gone = {j.id for j in (*tick.cancelled, *tick.expired, *tick.run, *tick.prefill)}
        waiting = [j for j in waiting if j.id not in gone]
        running = [j for j in running if j.id not in gone] + list(tick.prefill)
        for j in running:
            steps[j.id] = steps.get(j.id, 0) + 1
        running = [j for j in running if steps[j.id] < 3]
    assert not waiting
    assert not running


def test_the_oldest_goes_first_and_a_large_one_is_not_overtaken() -> None:
    running = [job(0, generates=True, n_rows=2)]
    large, small = job(1, generates=True, n_rows=3), job(2, generates=True, n_rows=1)
    first, second = job(3, generates=False), job(4, generates=False)
    tick = plan_tick([large, small, first, second], UnderWay(decoding=running), LIMITS, 0.0)
    assert tick.prefill == ()
    assert tick.run == (first,)
    assert plan_tick([large, small], UnderWay(), LIMITS, 0.0).prefill == (large, small)
    too_large = job(5, generates=True, n_rows=9)
    assert plan_tick([too_large, small], UnderWay(), LIMITS, 0.0).prefill == (too_large,)


def test_generations_of_like_prompts_begin_together() -> None:
    limits = Limits(max_rows=8, max_prefill_tokens=60)
    prompts = [10, 40, 9, 10, 12, 10, 10]
    waiting = [job(n, generates=True, n_prompt=length, n_positions=64) for n, length in enumerate(prompts)]
    begun = plan_tick(waiting, UnderWay(), limits, 0.0).prefill
    assert [j.id for j in begun] == [0, 2, 3, 4, 5]  # 40 would pad the rest; a sixth would pass 60 tokens


def test_one_long_row_does_not_widen_the_slots_of_all_without_bound() -> None:
    limits = Limits(max_rows=8, max_cache_positions=400)
    running = [job(n, generates=True, n_positions=50) for n in range(3)]
    long = job(7, generates=True, n_positions=150)
    assert plan_tick([long], UnderWay(decoding=running), limits, 0.0).prefill == ()  # 4 rows × 150
    assert plan_tick([long], UnderWay(decoding=running[:1]), limits, 0.0).prefill == (long,)


@dataclass(frozen=True)
class Place:
    is_inside_attention: bool = False


def capture(number: int, *lengths: int, reads_attention: bool = False) -> Job:
    work = CaptureWork([[1] * n for n in lengths], [Place(reads_attention)], lambda seen: at_once(lambda: seen)())
    return Job(number, work, 0.0, None)


def test_captures_of_like_length_share_a_pass() -> None:
    limits = Limits(max_rows=4, max_capture_tokens=100, max_padding=0.25)
    short, long, same, other, call = (
        capture(0, 16),
        capture(1, 60),
        capture(2, 18, 20),
        capture(3, 16, reads_attention=True),
        job(4, generates=False),
    )
    assert plan_tick([short, long, same, other, call], UnderWay(), limits, 0.0).run == (short, same)
    assert plan_tick([long, short, same, other, call], UnderWay(), limits, 0.0).run == (
        long,
    )  # padding would waste half
    assert plan_tick([call, short, same], UnderWay(), limits, 0.0).run == (call,)
    many = [capture(n, 20) for n in range(9)]
    assert len(plan_tick(many, UnderWay(), limits, 0.0).run) == 5  # 100 tokens


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_a_shared_pass_keeps_its_bounds(lengths: list[int]) -> None:
    limits = Limits(max_rows=4, max_capture_tokens=1000, max_padding=0.25)
    group = plan_tick([capture(n, length) for n, length in enumerate(lengths)], UnderWay(), limits, 0.0).run
    taken = [lengths[j.id] for j in group]
    assert group[0].id == 0
    if len(taken) > 1:
        assert len(taken) * max(taken) <= 1000
        assert sum(taken) >= 0.75 * len(taken) * max(taken)


def test_admission_refuses_the_one_too_many_and_takes_the_next() -> None:
    refused: list[str] = []
    admission = Admission(Demand(2, 4, 100, 1000), refused.append)
    first, second = admission.permit(Demand(1, 2, 60, 10)), admission.permit(Demand(1, 2, 10, 20))
    with pytest.raises(Overloaded, match="2 requests of at most 2 requests inside, and this request brings 1 request"):
        admission.permit(Demand())
    first.release()
    first.release()  # once is enough, twice does not free another's place
    with pytest.raises(Overloaded, match="10 tokens of at most 100 tokens inside, and this request brings 91 tokens"):
        admission.permit(Demand(tokens=91))
    with pytest.raises(Overloaded, match="rows"):
        admission.permit(Demand(rows=3))
    third = admission.permit(Demand(tokens=90, rows=2, bytes=980))
    with pytest.raises(LimitExceeded, match="takes 101 tokens, the server has 100 tokens"):
        admission.permit(Demand(tokens=101))
    for permit in (second, third):
        permit.release()
    assert admission.inside == Demand(0, 0, 0, 0)
    assert admission.peak_bytes == 20 + 980  # the refused never came in, the first had gone
    assert refused == ["requests", "tokens", "rows", "tokens"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.booleans()), max_size=40))
def test_what_is_inside_never_passes_a_bound(program: list[tuple[int, int, bool]]) -> None:
    bounds = Demand(3, 8, 20, 10**6)
    admission, held = Admission(bounds), []
    for rows, tokens, leaves in program:
        if leaves and held:
            held.pop(0)[1].release()
            continue
        demand = Demand(1, rows, tokens, 0)
        try:
            held.append((demand, admission.permit(demand)))
        except Overloaded:
            assert sum((d for d, _ in held), demand).beyond(bounds)
        assert admission.inside == sum((d for d, _ in held), Demand(0))
        assert admission.inside.beyond(bounds) is None
