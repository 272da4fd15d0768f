"""The policy as a pure function, and the worker's promise that every job ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.engine.protocol import RowStep
from neuronpedia_inference.errors import EngineFailed, InvalidRequest, NotReady, Overloaded
from neuronpedia_inference.scheduler.admission import Admission
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Job, Ticket
from neuronpedia_inference.scheduler.policy import Limits, plan_tick
from neuronpedia_inference.scheduler.worker import Worker

LIMITS = Limits(max_rows=4)


def job(number: int, *, generates: bool, n_rows: int = 1, deadline_s: float | None = None) -> Job:
    work = GenerateWork(list, lambda steps: steps) if generates else CallWork(lambda: None)
    return Job(number, work, n_rows, deadline_s)


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
            )
            if draw(st.integers(0, 4)) == 0:
                made.ticket.cancel()
            found.append(made)
        return found

    return some(0, running=False), some(100, running=True)


@given(queues())
def test_no_job_is_lost_or_taken_twice_and_bounds_hold(jobs: tuple[list[Job], list[Job]]) -> None:
    waiting, running = jobs
    tick = plan_tick(waiting, running, LIMITS, now_s=5.0)
    taken = [*tick.cancelled, *tick.expired, *tick.run, *([tick.prefill] if tick.prefill else []), *tick.decode]
    assert len({j.id for j in taken}) == len(taken)
    assert {j.id for j in taken} <= {j.id for j in (*waiting, *running)}
    assert all(j.ticket.cancelled for j in tick.cancelled)
    assert not any(j.ticket.cancelled for j in taken if j not in tick.cancelled)
    assert {j.id for j in running if not j.ticket.cancelled} == {j.id for j in tick.decode}
    assert all(j.deadline_s == 1.0 for j in tick.expired)
    if tick.prefill is not None and tick.decode:
        assert sum(j.n_rows for j in (*tick.decode, tick.prefill)) <= LIMITS.max_rows


@given(queues())
def test_everything_ends(jobs: tuple[list[Job], list[Job]]) -> None:
    """Carried out by the book, with generations of three steps, any queue is empty after a bounded number of ticks."""
    waiting, running = jobs
    steps = {j.id: 0 for j in running}
    for _ in range(3 * (len(waiting) + len(running)) + 3):
        tick = plan_tick(waiting, running, LIMITS, now_s=5.0)
        gone = {j.id for j in (*tick.cancelled, *tick.expired, *tick.run, tick.prefill) if j is not None}
        waiting = [j for j in waiting if j.id not in gone]
        running = [j for j in running if j.id not in gone] + ([tick.prefill] if tick.prefill else [])
        for j in running:
            steps[j.id] = steps.get(j.id, 0) + 1
        running = [j for j in running if steps[j.id] < 3]
    assert not waiting
    assert not running


def test_the_oldest_goes_first_and_a_large_one_is_not_overtaken() -> None:
    running = [job(0, generates=True, n_rows=2)]
    large, small = job(1, generates=True, n_rows=3), job(2, generates=True, n_rows=1)
    first, second = job(3, generates=False), job(4, generates=False)
    tick = plan_tick([large, small, first, second], running, LIMITS, 0.0)
    assert tick.prefill is None
    assert tick.run == (first,)
    assert plan_tick([large, small], [], LIMITS, 0.0).prefill is large


@dataclass(frozen=True)
class Place:
    is_residual: bool


def capture(number: int, *lengths: int, is_residual: bool = True) -> Job:
    work = CaptureWork([[1] * n for n in lengths], [Place(is_residual)], lambda seen: seen)
    return Job(number, work, 1, None)


def test_captures_of_like_length_share_a_pass() -> None:
    limits = Limits(max_rows=4, max_capture_tokens=100, max_padding=0.25)
    short, long, same, other, call = (
        capture(0, 16),
        capture(1, 60),
        capture(2, 18, 20),
        capture(3, 16, is_residual=False),
        job(4, generates=False),
    )
    assert plan_tick([short, long, same, other, call], [], limits, 0.0).run == (short, same)
    assert plan_tick([long, short, same, other, call], [], limits, 0.0).run == (long,)  # padding would waste half
    assert plan_tick([call, short, same], [], limits, 0.0).run == (call,)
    many = [capture(n, 20) for n in range(9)]
    assert len(plan_tick(many, [], limits, 0.0).run) == 5  # 100 tokens


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_a_shared_pass_keeps_its_bounds(lengths: list[int]) -> None:
    limits = Limits(max_rows=4, max_capture_tokens=1000, max_padding=0.25)
    group = plan_tick([capture(n, length) for n, length in enumerate(lengths)], [], limits, 0.0).run
    taken = [lengths[j.id] for j in group]
    assert group[0].id == 0
    if len(taken) > 1:
        assert len(taken) * max(taken) <= 1000
        assert sum(taken) >= 0.75 * len(taken) * max(taken)


class CountingEngine:
    """Rows of numbers; prompt [-1] fails, and its failure is a bug and not a refusal."""

    def __init__(self) -> None:
        self.steps = 0
        self.passes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def capture(self, prompts: Sequence[Sequence[int]], points: object) -> list[Any]:
        self.passes.append(len(prompts))
        if [-1] in map(list, prompts):
            raise ZeroDivisionError("bug")
        return [{"sum": sum(prompt)} for prompt in prompts]

    def generate(self, rows: Sequence[Any]) -> CountingGeneration:
        return CountingGeneration(self, list(rows))


class CountingGeneration:
    def __init__(self, engine: CountingEngine, rows: list[int]) -> None:
        self.engine, self.left = engine, dict(enumerate(rows))

    @property
    def done(self) -> bool:
        return not self.left

    def step(self) -> list[RowStep]:
        self.engine.gate.wait(10)
        self.engine.steps += 1
        steps = [
            RowStep(row, self.engine.steps, finish_reason=None if n > 1 else "length") for row, n in self.left.items()
        ]
        self.left = {row: n - 1 for row, n in self.left.items() if n > 1}
        return steps


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def worker(engine: CountingEngine):
    made = Worker(engine, LIMITS, n_threads=1, max_wait_s=None)
    yield made
    engine.gate.set()
    made.close()


def generate(worker: Worker, n_steps: int, on_event: Callable[[Any], None] | None = None) -> Ticket:
    return worker.submit(GenerateWork(lambda: [n_steps], lambda steps: steps[-1].token_id), on_event=on_event)


def test_a_job_that_raises_fails_alone_and_the_next_is_served(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    bad = worker.submit(CaptureWork([[-1]], [], lambda seen: seen))
    good = worker.submit(CaptureWork([[1, 2]], [], lambda seen: seen[0]["sum"]))
    refused = worker.submit(CallWork(lambda: _raise(InvalidRequest("no"))))
    with pytest.raises(EngineFailed) as failure:
        bad.future.result(10)
    assert "bug" not in str(failure.value)  # the caller learns nothing of our insides, the log does
    assert any(record.exc_info and "bug" in str(record.exc_info[1]) for record in caplog.records)
    assert good.future.result(10) == 3
    with pytest.raises(InvalidRequest, match="no"):
        refused.future.result(10)
    assert worker.healthy


def test_captures_run_between_the_steps_of_a_generation(worker: Worker, engine: CountingEngine) -> None:
    started = threading.Event()
    long = generate(worker, 100_000, on_event=lambda _: started.set())
    assert started.wait(10)
    assert worker.submit(CaptureWork([[4]], [], lambda seen: seen[0]["sum"])).future.result(10) == 4
    assert not long.future.done()
    long.cancel()


def ask_together(worker: Worker, engine: CountingEngine, prompts: list[list[int]]) -> list[Ticket]:
    """Captures that wait at the same time, because a generation is in the middle of a step."""
    engine.gate.clear()
    busy = generate(worker, 1)
    _until(lambda: worker.n_running == 1)
    tickets = [worker.submit(CaptureWork([p], [Place(True)], lambda seen: seen[0]["sum"])) for p in prompts]
    engine.gate.set()
    busy.future.result(10)
    return tickets


def test_captures_that_wait_together_run_in_one_pass_and_equal_prompts_once(
    worker: Worker, engine: CountingEngine
) -> None:
    tickets = ask_together(worker, engine, [[1, 2], [3, 4], [1, 2], [5, 6]])
    assert [ticket.future.result(10) for ticket in tickets] == [3, 7, 3, 11]
    assert engine.passes == [3]
    assert worker.counts["merged"] == 4


def test_a_failing_member_of_a_merged_pass_fails_alone(worker: Worker, engine: CountingEngine) -> None:
    good, bad, other = ask_together(worker, engine, [[1], [-1], [2]])
    assert (good.future.result(10), other.future.result(10)) == (1, 2)
    with pytest.raises(EngineFailed):
        bad.future.result(10)
    assert engine.passes == [3, 1, 1, 1]


def test_a_cancelled_generation_leaves_at_the_next_step(worker: Worker, engine: CountingEngine) -> None:
    events: list[int] = []
    first = threading.Event()

    def on_event(event: int) -> None:
        events.append(event)
        engine.gate.clear()
        first.set()

    ticket = generate(worker, 50, on_event)
    assert first.wait(10)
    ticket.cancel()
    engine.gate.set()
    with pytest.raises(CancelledError):
        ticket.future.result(10)
    _until(lambda: worker.n_running == 0)
    assert engine.steps <= 2
    assert len(events) == 1
    assert worker.counts["cancelled"] == 1


def test_closing_finishes_what_is_inside_and_refuses_what_comes(engine: CountingEngine) -> None:
    worker = Worker(engine, LIMITS, n_threads=1, max_wait_s=None)
    tickets = [generate(worker, 5), worker.submit(CaptureWork([[7]], [], lambda seen: seen[0]["sum"]))]
    worker.close()
    assert [ticket.future.result(0) for ticket in tickets][1] == 7
    with pytest.raises(NotReady):
        generate(worker, 1)


def test_a_dying_worker_fails_every_ticket(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the death is what is wanted here
    worker = Worker(engine, LIMITS, n_threads=1, max_wait_s=None)
    engine.gate.clear()
    running, waiting = generate(worker, 100_000), generate(worker, 100_000)
    broken = worker.submit(CallWork(lambda: _raise(SystemExit())))  # what no handler may swallow
    engine.gate.set()
    for ticket in (broken, running, waiting):
        assert isinstance(ticket.future.exception(10), NotReady)
    with pytest.raises(NotReady):
        generate(worker, 1)


def test_waiting_too_long_is_a_refusal_and_not_a_hang(engine: CountingEngine) -> None:
    worker = Worker(engine, LIMITS, n_threads=1, max_wait_s=0.05)
    engine.gate.clear()
    running = generate(worker, 2)
    _until(lambda: worker.n_running == 1)
    late = generate(worker, 2)
    time.sleep(0.1)
    engine.gate.set()
    with pytest.raises(Overloaded, match=r"0\.05 s"):
        late.future.result(10)
    assert running.future.result(10) == 2
    worker.close()


def test_admission_refuses_the_one_too_many_and_takes_the_next() -> None:
    admission = Admission(2)
    first, second = admission.permit(), admission.permit()
    with pytest.raises(Overloaded, match="2 requests"):
        admission.permit()
    first.release()
    first.release()  # once is enough, twice does not free another's place
    admission.permit()
    with pytest.raises(Overloaded):
        admission.permit()
    second.release()
    assert admission.inside == 1


def _raise(error: BaseException) -> None:
    raise error


def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
