"""What runs next and who is let in: pure decisions, over random queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.costs import Demand, Grid, together
from neuronpedia_inference.errors import LimitExceeded, Overloaded
from neuronpedia_inference.scheduler.admission import Admission
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Job, Steps
from neuronpedia_inference.scheduler.policy import (
    FIRST_STEPS,
    OVERTAKEN_STEPS,
    PARKED_STEPS,
    Limits,
    Stint,
    UnderWay,
    plan_tick,
)

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
    n_new: int = 4,
    came_at: int = 0,
) -> Job:
    work = GenerateWork(at_once(list), n_rows, n_prompt, n_prompt + n_new) if generates else CallWork(at_once(list))
    return Job(number, work, 0.0, deadline_s, came_at=came_at)


@st.composite
def queues(draw: Any) -> tuple[list[Job], UnderWay]:
    def some(first: int, *, running: bool) -> list[Job]:
        found = []
        for number in range(draw(st.integers(0, 6))):
            made = job(
                first + number,
                generates=running or draw(st.booleans()),
                n_rows=draw(st.integers(1, 5)),
                deadline_s=draw(st.sampled_from([None, 1.0, 9.0])),
                n_prompt=draw(st.sampled_from([1, 5, 6, 40])),
                n_new=draw(st.sampled_from([1, 4, 50, 400])),
                came_at=draw(st.integers(0, 90)),
            )
            if draw(st.integers(0, 4)) == 0:
                made.ticket.cancel()
            found.append(made)
        return found

    def stints(jobs: list[Job]) -> list[Stint]:
        return [Stint(one, draw(st.sampled_from([0, FIRST_STEPS, 50, PARKED_STEPS]))) for one in jobs]

    return some(0, running=False), UnderWay(
        decoding=stints(some(100, running=True)), parked=stints(some(200, running=True))
    )


def stints(jobs: Sequence[Job], n_steps: int = 0) -> list[Stint]:
    return [Stint(one, n_steps) for one in jobs]


def n_rows(jobs: Sequence[Job]) -> int:
    return sum(one.work.n_rows for one in jobs if isinstance(one.work, GenerateWork))


@given(queues())
def test_no_job_is_lost_or_taken_twice_and_bounds_hold(given_jobs: tuple[list[Job], UnderWay]) -> None:
    waiting, under_way = given_jobs
    limits = Limits(max_rows=6, max_prefill_tokens=40)
    tick = plan_tick(waiting, under_way, limits, now_s=5.0)
    decoding, parked = ([stint.job for stint in stints] for stints in (under_way.decoding, under_way.parked))
    taken = [*tick.cancelled, *tick.expired, *tick.run, *tick.prefill, *tick.park, *tick.resume]
    assert len({j.id for j in taken}) == len(taken)
    assert {j.id for j in tick.park} <= {j.id for j in decoding}
    assert {j.id for j in tick.resume} <= {j.id for j in parked}
    assert {j.id for j in (*tick.expired, *tick.run, *tick.prefill)} <= {j.id for j in waiting}
    assert {j.id for j in tick.cancelled} == {j.id for j in (*waiting, *decoding, *parked) if j.ticket.cancelled}
    assert all(j.deadline_s == 1.0 for j in tick.expired)
    staying = [j for j in decoding if not j.ticket.cancelled and j not in tick.park]
    coming = [*tick.prefill, *tick.resume]
    if coming and len(staying) + len(coming) > 1:
        assert n_rows([*staying, *coming]) <= limits.max_rows
    assert not any(stint.n_steps < FIRST_STEPS for stint in under_way.decoding if stint.job in tick.park)
    assert coming or not tick.park, "nobody makes way for nobody"
    if len(tick.prefill) > 1:
        lengths = [j.work.n_prompt_tokens for j in tick.prefill if isinstance(j.work, GenerateWork)]
        assert n_rows(tick.prefill) * max(lengths) <= limits.max_prefill_tokens
    ready = [j for j in waiting if isinstance(j.work, GenerateWork) and j not in (*tick.cancelled, *tick.expired)]
    if tick.prefill:
        assert due(tick.prefill[0]) == min(map(due, ready))
    if ready or [j for j in parked if not j.ticket.cancelled]:
        assert staying or coming, "with room for all, somebody decodes"


def due(one: Job) -> int:
    assert isinstance(one.work, GenerateWork)
    return one.came_at + min(one.work.n_new, OVERTAKEN_STEPS)


def carried_out(waiting: list[Job], running: list[Job], limits: Limits, n_steps: int) -> dict[int, int]:
    """By the book, with generations of so many steps: the tick at which each ended."""
    decoding, parked = {j.id: (j, 0) for j in running}, dict[int, tuple[Job, int]]()
    steps, ended, clock = {j.id: 0 for j in running}, dict[int, int](), 0
    for tick_number in range(n_steps * (len(waiting) + len(running)) + n_steps):
        under_way = UnderWay(
            decoding=[Stint(j, clock - since) for j, since in decoding.values()],
            parked=[Stint(j, clock - since) for j, since in parked.values()],
        )
        tick = plan_tick(waiting, under_way, limits, now_s=5.0)
        gone = {j.id for j in (*tick.cancelled, *tick.expired, *tick.run, *tick.prefill, *tick.park, *tick.resume)}
        waiting = [j for j in waiting if j.id not in gone]
        decoding, parked = ({n: at for n, at in held.items() if n not in gone} for held in (decoding, parked))
        parked |= {j.id: (j, clock) for j in tick.park}
        decoding |= {j.id: (j, clock) for j in (*tick.resume, *tick.prefill)}
        clock += bool(decoding)
        for number in decoding:
            steps[number] = steps.get(number, 0) + 1
        ended |= {number: tick_number for number in decoding if steps[number] == n_steps}
        decoding = {n: at for n, at in decoding.items() if n not in ended}
    assert not waiting
    assert not decoding
    assert not parked
    return ended


@given(queues(), st.sampled_from([1, 3, 9, 40]))
def test_everything_ends(given_jobs: tuple[list[Job], UnderWay], n_steps: int) -> None:
    """Any queue is empty after a bounded number of ticks."""
    waiting, under_way = given_jobs
    carried_out(waiting, [stint.job for stint in under_way.decoding], LIMITS, n_steps)


def test_who_has_decoded_longest_makes_way_and_comes_back() -> None:
    running = [Stint(job(n, generates=True), 10 * n) for n in range(4)]
    new = job(9, generates=True)
    tick = plan_tick([new], UnderWay(decoding=running), LIMITS, 0.0)
    assert (tick.park, tick.prefill, tick.resume) == ((running[3].job,), (new,), ())
    beginners = [Stint(one.job, FIRST_STEPS - 1) for one in running]
    assert plan_tick([new], UnderWay(decoding=beginners), LIMITS, 0.0).park == ()
    parked = [Stint(job(7, generates=True), 3)]
    tick = plan_tick([], UnderWay(decoding=running[:3], parked=parked), LIMITS, 0.0)
    assert (tick.park, tick.resume) == ((), (parked[0].job,)), "there is room"
    tick = plan_tick([], UnderWay(decoding=running, parked=parked), LIMITS, 0.0)
    assert (tick.park, tick.resume) == ((), ()), "its time has not come"
    due = [Stint(parked[0].job, PARKED_STEPS)]
    tick = plan_tick([new], UnderWay(decoding=running, parked=due), LIMITS, 0.0)
    assert (tick.park, tick.resume) == ((running[3].job, running[2].job), (due[0].job,))
    assert tick.prefill == (new,)
    large = [Stint(job(8, generates=True, n_rows=9), PARKED_STEPS)]
    tick = plan_tick([new], UnderWay(decoding=running, parked=large), LIMITS, 0.0)
    assert (tick.park, tick.prefill, tick.resume) == ((), (), ()), "one is a beginner, and nobody comes in before it"
    tick = plan_tick([new], UnderWay(decoding=running[1:], parked=large), LIMITS, 0.0)
    assert (len(tick.park), tick.prefill, tick.resume) == (3, (), (large[0].job,))


def test_a_stream_of_newcomers_does_not_keep_out_who_made_way() -> None:
    """Long generations fill the batch; short ones come without end, as many as fit; every long one gets its share."""
    limits = Limits(max_rows=4)
    decoding = {n: (job(n, generates=True), 0) for n in range(4)}
    parked: dict[int, tuple[Job, int]] = {}
    steps = dict.fromkeys(range(4), 0)
    left: dict[int, int] = {}
    next_id = 100
    n_ticks = 6000
    for clock in range(n_ticks):
        waiting = [job(next_id + n, generates=True) for n in range(4)]
        next_id += 4
        under_way = UnderWay(
            decoding=[Stint(j, clock - since) for j, since in decoding.values()],
            parked=[Stint(j, clock - since) for j, since in parked.values()],
        )
        tick = plan_tick(waiting, under_way, limits, 0.0)
        moved = {j.id for j in (*tick.park, *tick.resume)}
        decoding, parked = ({n: at for n, at in held.items() if n not in moved} for held in (decoding, parked))
        parked |= {j.id: (j, clock) for j in tick.park}
        decoding |= {j.id: (j, clock) for j in (*tick.resume, *tick.prefill)}
        left |= {j.id: FIRST_STEPS for j in tick.prefill}
        for number in list(decoding):
            if number < 4:
                steps[number] += 1
            else:
                left[number] -= 1
                if left[number] == 0:
                    del decoding[number]
    assert min(steps.values()) > n_ticks * FIRST_STEPS / (PARKED_STEPS + 4 * FIRST_STEPS), steps


def test_the_oldest_goes_first_and_a_large_one_is_not_overtaken() -> None:
    running = [job(0, generates=True, n_rows=2)]
    large, small = job(1, generates=True, n_rows=3), job(2, generates=True, n_rows=1)
    first, second = job(3, generates=False), job(4, generates=False)
    tick = plan_tick([large, small, first, second], UnderWay(decoding=stints(running)), LIMITS, 0.0)
    assert tick.prefill == ()
    assert tick.run == (first,)
    assert plan_tick([large, small], UnderWay(), LIMITS, 0.0).prefill == (large, small)
    too_large = job(5, generates=True, n_rows=9)
    assert plan_tick([too_large, small], UnderWay(), LIMITS, 0.0).prefill == (too_large,)


def test_who_asks_for_little_goes_first_and_not_for_ever() -> None:
    long = [job(n, generates=True, n_new=4000, came_at=7) for n in range(20)]
    little = job(99, generates=True, n_new=4, came_at=7 + OVERTAKEN_STEPS - 5)
    limits = Limits(max_rows=4, max_prefill_tokens=5)
    assert plan_tick([*long, little], UnderWay(), limits, 0.0).prefill == (little,)
    beginners = [Stint(one, FIRST_STEPS) for one in long[:4]]
    tick = plan_tick([*long[4:], little], UnderWay(decoding=beginners), limits, 0.0)
    assert (tick.prefill, len(tick.park)) == ((little,), 1)
    little.came_at += 1
    assert plan_tick([*long, little], UnderWay(), limits, 0.0).prefill == (long[0],), "who has waited long enough"
    more = job(100, generates=True, n_new=OVERTAKEN_STEPS, came_at=7)
    assert plan_tick([*long, more], UnderWay(), limits, 0.0).prefill == (long[0],), "much is much"


def test_small_prompts_go_before_a_long_one_that_runs() -> None:
    limits = Limits(max_rows=8, max_prefill_tokens=500, small_pass=20)
    long, next_long = job(0, generates=True, n_prompt=900), job(1, generates=True, n_prompt=90)
    small = [job(2 + n, generates=True, n_prompt=6) for n in range(4)]
    held_up = UnderWay(joining=[long], can_be_passed=True)
    assert plan_tick([next_long, *small], held_up, limits, 0.0).prefill == tuple(small[:3]), "as many as are small"
    assert plan_tick([next_long, *small], UnderWay(joining=[long]), limits, 0.0).prefill == ()
    assert plan_tick([next_long], held_up, limits, 0.0).prefill == ()


def test_generations_of_like_prompts_begin_together() -> None:
    limits = Limits(max_rows=8, max_prefill_tokens=60)
    prompts = [10, 40, 9, 10, 12, 10, 10]
    waiting = [job(n, generates=True, n_prompt=length) for n, length in enumerate(prompts)]
    begun = plan_tick(waiting, UnderWay(), limits, 0.0).prefill
    assert [j.id for j in begun] == [0, 2, 3, 4, 5]  # 40 would pad the rest; a sixth would pass 60 tokens


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5000)), min_size=1, max_size=12))
def test_what_is_admitted_holds_the_grid_of_all_rows(requests: list[tuple[int, int]]) -> None:
    """And one slot more, in which parked rows change places."""
    demands = [Demand(rows=rows, bytes=7, positions=positions) for rows, positions in requests]
    total = together(demands, 10)
    grid = Grid.of(sum(rows for rows, _ in requests) + 1, max(positions for _, positions in requests))
    assert grid.slots > sum(rows for rows, _ in requests)
    assert grid.slots <= 1.25 * (1 + sum(rows for rows, _ in requests))
    assert grid.columns < 64 + 1.25 * max(positions for _, positions in requests)
    assert total.bytes == 7 * len(requests) + 10 * int(1.2 * grid.positions)
    assert together(demands[1:], 10).bytes <= total.bytes
    assert together(demands, 10, Grid(1, 64)).bytes == total.bytes
    assert together([], 10, Grid(16, 512)).bytes == 10 * 16 * 512


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
    limits = Limits(max_rows=4, max_capture_tokens=1000, max_padding=0.25, small_pass=0)
    group = plan_tick([capture(n, length) for n, length in enumerate(lengths)], UnderWay(), limits, 0.0).run
    taken = [lengths[j.id] for j in group]
    assert group[0].id == 0
    if len(taken) > 1:
        assert len(taken) * max(taken) <= 1000
        assert sum(taken) >= 0.75 * len(taken) * max(taken)


def test_admission_refuses_the_one_too_many_and_takes_the_next() -> None:
    refused: list[str] = []
    admission = Admission(Demand(2, 4, 100, 1000), refused=refused.append)
    first, second = admission.permit(Demand(1, 2, 60, 10)), admission.permit(Demand(1, 2, 10, 20))
    with pytest.raises(
        Overloaded, match="2 requests of at most 2 requests inside, and with this request it would be 3 requests"
    ):
        admission.permit(Demand())
    first.release()
    first.release()  # once is enough, twice does not free another's place
    with pytest.raises(
        Overloaded, match="10 tokens of at most 100 tokens inside, and with this request it would be 101 tokens"
    ):
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
            assert together([demand, *(d for d, _ in held)], 0).beyond(bounds)
        assert admission.inside == together([d for d, _ in held], 0)
        assert admission.inside.beyond(bounds) is None
