"""The worker's promise: every job ends, whoever fails, leaves or waits beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from types import SimpleNamespace
from typing import Any

import pytest

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.engine.protocol import RowSpec, RowStep
from neuronpedia_inference.errors import EngineFailed, InvalidRequest, NotReady, Overloaded
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.scheduler import worker as worker_module
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Steps, Ticket
from neuronpedia_inference.scheduler.policy import FIRST_STEPS, Limits
from neuronpedia_inference.scheduler.worker import Worker
from tests.unit.counting import CountingEngine, CountingJoining, CountingPass, SummingPass
from tests.unit.test_policy import LIMITS, Place, at_once


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


def start(engine: CountingEngine, max_wait_s: float | None = None, limits: Limits = LIMITS, **more: Any) -> Worker:
    return Worker(engine, limits, n_threads=1, max_wait_s=max_wait_s, metrics=Metrics(), **more)


@pytest.fixture
def worker(engine: CountingEngine):
    made = start(engine)
    yield made
    engine.gate.set()
    made.close()
    assert engine.lane.rows == []


def counts(worker: Worker) -> dict[str, int]:
    return worker._ends._metrics.counts()


def generation(*numbers: int) -> GenerateWork:
    """One row per number, as many tokens as the number says."""
    rows = [RowSpec((number,), Sampling(number)) for number in numbers]
    return GenerateWork(at_once(lambda: rows), len(numbers), 1, 1 + max(numbers))


class Asked:
    """A ticket whose future gives the last token of every row."""

    def __init__(self, worker: Worker, work: GenerateWork, on_event: Callable[[Any], None] | None = None) -> None:
        self._on_event = on_event
        self._latest: dict[int, int] = {}
        self.future: Future[list[int]] = Future()
        self._ticket = worker.submit(work, on_event=self._take)
        self.cancel = self._ticket.cancel
        self._ticket.future.add_done_callback(self._end)

    def _take(self, steps: Sequence[RowStep]) -> None:
        self._latest.update({step.row.place: step.token_id for step in steps})
        if self._on_event is not None:
            self._on_event(steps)

    def _end(self, ended: Future[None]) -> None:
        if ended.cancelled():
            self.future.cancel()
        elif ended.exception() is not None:
            self.future.set_exception(ended.exception())
        else:
            self.future.set_result([self._latest[place] for place in sorted(self._latest)])


def generate(worker: Worker, n_steps: int, on_event: Callable[[Any], None] | None = None) -> Asked:
    return Asked(worker, generation(n_steps), on_event)


def summing(*prompts: Sequence[int]) -> CaptureWork:
    return CaptureWork(prompts, [Place()], lambda seen: at_once(lambda: seen[0]["sum"])())


def call(run: Callable[[], Any]) -> CallWork:
    return CallWork(at_once(run))


def test_a_job_that_raises_fails_alone_and_the_next_is_served(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    bad = worker.submit(summing([-1]))
    good = worker.submit(summing([1, 2]))
    refused = worker.submit(call(lambda: _raise(InvalidRequest("no"))))
    with pytest.raises(EngineFailed) as failure:
        bad.future.result(60)
    assert "bug" not in str(failure.value)  # the caller learns nothing of our insides, the log does
    assert any(record.exc_info and "bug" in str(record.exc_info[1]) for record in caplog.records)
    assert good.future.result(60) == 3
    with pytest.raises(InvalidRequest, match="no"):
        refused.future.result(60)
    assert worker.healthy


def test_captures_run_between_the_steps_of_a_generation(worker: Worker, engine: CountingEngine) -> None:
    started = threading.Event()
    long = generate(worker, 100_000, on_event=lambda _: started.set())
    assert started.wait(60)
    assert worker.submit(summing([4])).future.result(60) == 4
    assert not long.future.done()
    long.cancel()


def ask_together(worker: Worker, engine: CountingEngine, prompts: list[list[int]]) -> list[Ticket]:
    """Captures that wait at the same time, because a generation is in the middle of a step."""
    engine.gate.clear()
    busy = generate(worker, 1)
    _until(lambda: engine.lane.prefills != [])
    tickets = [worker.submit(summing(p)) for p in prompts]
    engine.gate.set()
    busy.future.result(60)
    return tickets


def test_captures_that_wait_together_run_in_one_pass_and_equal_prompts_once(
    worker: Worker, engine: CountingEngine
) -> None:
    tickets = ask_together(worker, engine, [[1, 2], [3, 4], [1, 2], [5, 6]])
    assert [ticket.future.result(60) for ticket in tickets] == [3, 7, 3, 11]
    assert engine.passes == [3]


def test_those_who_were_answered_together_are_waited_for(
    worker: Worker, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuronpedia_inference.scheduler.worker.LINGER_S", 600.0)
    for ticket in ask_together(worker, engine, [[1], [2], [3]]):
        ticket.future.result(60)
    again = [worker.submit(summing([n])) for n in (4, 5)]
    _until(lambda: worker.n_waiting == 2)
    assert not again[0].future.done()
    again.append(worker.submit(summing([6])))
    assert [ticket.future.result(60) for ticket in again] == [4, 5, 6]
    assert engine.passes == [3, 3]


def test_who_does_not_come_back_is_not_waited_for_twice(worker: Worker, engine: CountingEngine) -> None:
    for ticket in ask_together(worker, engine, [[1], [2], [3]]):
        ticket.future.result(60)
    assert worker.submit(summing([4])).future.result(60) == 4
    assert worker.submit(summing([5])).future.result(60) == 5
    assert engine.passes == [3, 1, 1]


def test_a_failing_member_of_a_merged_pass_fails_alone(worker: Worker, engine: CountingEngine) -> None:
    good, bad, other = ask_together(worker, engine, [[1], [-1], [2]])
    assert (good.future.result(60), other.future.result(60)) == (1, 2)
    with pytest.raises(EngineFailed):
        bad.future.result(60)
    assert engine.passes == [3, 1, 1, 1]


def test_a_cancelled_generation_leaves_at_the_next_step(worker: Worker, engine: CountingEngine) -> None:
    events: list[Any] = []
    first = threading.Event()

    def on_event(event: Any) -> None:
        events.append(event)
        engine.gate.clear()
        first.set()

    ticket = generate(worker, 50, on_event)
    assert first.wait(60)
    ticket.cancel()
    engine.gate.set()
    with pytest.raises(CancelledError):
        ticket.future.result(60)
    _until(lambda: worker.n_running == 0)
    assert engine.steps <= 2
    assert len(events) == 1
    assert counts(worker)["cancelled"] == 1


def test_who_waits_for_a_ticket_that_was_cancelled_is_told(worker: Worker) -> None:
    """A process that ended within the move of its weights waited for it as long as it may (2 s)."""
    ticket = worker.submit(CallWork(lambda: waiting_for(Future(), [])))
    ticket.cancel()
    assert not wait([ticket.future], 60).not_done


def test_freed_memory_is_given_back_once_in_a_pause(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "PAUSE_S", 0.01)
    given: list[int] = []
    worker = start(engine, give_back=lambda: given.append(engine.steps))
    assert not given  # nothing was done yet
    for n_pauses in (1, 2):
        generate(worker, 3).future.result(60)
        _until(lambda n=n_pauses: len(given) == n)
    time.sleep(0.1)  # as long as nothing is done, nothing is freed
    worker.close()
    assert given == [3, 6]


def test_freed_memory_is_given_back_within_long_work(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "AT_WORK_S", 0.0)
    given: list[int] = []
    worker = start(engine, give_back=lambda: given.append(engine.steps))
    generate(worker, 50).future.result(60)
    worker.close()
    assert any(1 < n_steps < 50 for n_steps in given)


def test_closing_finishes_what_is_inside_and_refuses_what_comes(engine: CountingEngine) -> None:
    worker = start(engine)
    tickets: list[Any] = [generate(worker, 5), worker.submit(summing([7]))]
    worker.close()
    assert [ticket.future.result(0) for ticket in tickets][1] == 7
    with pytest.raises(NotReady):
        generate(worker, 1)


def test_a_dying_worker_fails_every_ticket(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the death is what is wanted here
    worker = start(engine)
    engine.gate.clear()
    running, waiting = generate(worker, 100_000), generate(worker, 100_000)
    broken = worker.submit(call(lambda: _raise(SystemExit())))  # what no handler may swallow
    engine.gate.set()
    for ticket in (broken, running, waiting):
        assert isinstance(ticket.future.exception(60), NotReady)
    with pytest.raises(NotReady):
        generate(worker, 1)


@pytest.mark.parametrize("where", ["begin_capture", "capture", "begin", "join", "decode"])
def test_nobody_waits_on_a_worker_that_dies_in_the_middle(
    engine: CountingEngine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whatever it held in its hands at that moment."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the death is what is wanted here
    dying: dict[str, tuple[object, str]] = {
        "begin_capture": (engine, "begin_capture"),
        "capture": (SummingPass, "advance"),
        "begin": (engine.lane, "begin"),
        "join": (CountingJoining, "join"),
        "decode": (engine.lane, "decode"),
    }
    monkeypatch.setattr(*dying[where], lambda *_: _raise(SystemExit()))
    worker = start(engine)
    tickets = [worker.submit(summing([4])), generate(worker, 5), worker.submit(summing([5]))]
    failures = [ticket.future.exception(60) for ticket in tickets]
    assert any(isinstance(failure, NotReady) for failure in failures)
    assert all(failure is None or isinstance(failure, NotReady) for failure in failures)
    _until(lambda: not worker.healthy)


def test_a_device_on_which_nothing_works_any_more_leaves_nobody_waiting(
    engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even rows can be dropped: the thread dies of it, and everyone is told."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the death is what is wanted here
    worker = start(engine)
    engine.gate.clear()
    tickets = [generate(worker, 50) for _ in range(3)]
    _until(lambda: engine.lane.prefills != [])
    tickets.append(Asked(worker, generation(*[40] * 4)))  # waits for room
    monkeypatch.setattr(engine.lane, "drop", lambda rows: rows and _raise(RuntimeError("assert")))
    engine.lane.is_broken = True
    engine.gate.set()
    for ticket in tickets:
        assert isinstance(ticket.future.exception(60), EngineFailed | NotReady)
    assert counts(worker)["failed"] == 4
    assert not worker.healthy


def test_waiting_too_long_is_a_refusal_and_not_a_hang(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(f"{Worker.__module__}.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    worker = start(engine, 0.05)
    engine.gate.clear()
    running = generate(worker, 2)
    _until(lambda: engine.lane.prefills != [])
    late = generate(worker, 2)
    now_s[0] += 0.1
    engine.gate.set()
    with pytest.raises(Overloaded, match=r"0\.05 s"):
        late.future.result(60)
    assert running.future.result(60) == [0]
    worker.close()


def test_generations_that_come_together_decode_together_and_each_leaves_at_its_end(
    worker: Worker, engine: CountingEngine
) -> None:
    engine.gate.clear()
    first = generate(worker, 9)
    _until(lambda: engine.lane.prefills == [1])
    others = [Asked(worker, generation(n)) for n in (2, 4)]
    engine.gate.set()
    assert [ticket.future.result(60) for ticket in (first, *others)] == [[0], [0], [0]]
    assert engine.lane.prefills == [1, 2]
    assert max(engine.lane.batches) == 3
    assert engine.lane.batches[-1] == 1
    assert sum(engine.lane.batches) + 3 == 9 + 2 + 4


def test_a_generation_waits_until_its_rows_fit(worker: Worker, engine: CountingEngine) -> None:
    engine.gate.clear()
    tickets = [Asked(worker, generation(3, 3)) for _ in range(4)]
    engine.gate.set()
    assert [ticket.future.result(60) for ticket in tickets] == [[0, 0]] * 4
    assert max(engine.lane.batches) <= LIMITS.max_rows


def test_a_short_generation_does_not_wait_for_long_ones(worker: Worker, engine: CountingEngine) -> None:
    """Four of 10,000 tokens fill the batch and two more wait: all six go on, and a short one ends within some steps."""
    longs = [generate(worker, 10_000) for _ in range(6)]
    _until(lambda: engine.steps > 200)
    taken: list[int] = []

    def prepare() -> Steps:
        """On the worker's thread, as events are: the thread that asks may be late."""
        taken.append(engine.steps)
        yield from ()
        return [RowSpec((4,), Sampling(4))]

    short = Asked(worker, GenerateWork(prepare, 1, 1, 5), on_event=lambda _: taken.append(engine.steps))
    assert short.future.result(60) == [0]
    assert len(taken) == 5
    assert taken[-1] - taken[0] <= 2 * FIRST_STEPS + 4, "the batch lets it in after some steps, then its own"
    assert max(engine.lane.batches) <= LIMITS.max_rows
    _until(lambda: engine.steps > 2000)
    left = list(engine.lane.left.values())
    assert len(left) == 6
    assert max(left) - min(left) < 1500, left
    _until(lambda: worker.n_parked == 2)
    for one in longs:
        one.cancel()
    _until(lambda: worker.n_running == worker.n_parked == 0)


def test_small_prompts_go_before_a_long_one_that_runs_and_do_not_hold_it_up(
    engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt runs in twenty pieces, and small ones come without end: each is in after a piece or two of it."""
    advance = CountingPass.advance
    ran: list[int] = []
    """Tokens of every piece."""
    came: list[int] = []
    """Of every small one, how many pieces there were before it came, and before its first token."""
    asked: list[Asked] = []
    worker = start(engine, limits=Limits(max_rows=4, max_prefill_tokens=300))

    def ask() -> None:
        n_before = len(ran)
        asked.append(generate(worker, 2, on_event=lambda steps: came.append(len(ran) - n_before)))

    def piece(self: CountingPass, n_tokens: int) -> int:
        ran.append(advance(self, n_tokens))
        if self.n_tokens > 1 and not self.is_done:
            ask()
        return ran[-1]

    monkeypatch.setattr(CountingPass, "advance", piece)
    long = [RowSpec((3,) * 6000, Sampling(3))]
    assert Asked(worker, GenerateWork(at_once(lambda: long), 1, 6000, 6003)).future.result(60) == [0]
    assert all(one.future.result(60) == [0] for one in asked)
    worker.close()
    assert len(asked) >= 19
    assert sum(ran) == 6000 + len(asked)
    assert max(came) <= 4, came


def test_a_row_that_fails_takes_its_own_request_with_it_and_no_other(worker: Worker, engine: CountingEngine) -> None:
    engine.gate.clear()
    bad, good = Asked(worker, generation(666, 9)), Asked(worker, generation(5))
    engine.gate.set()
    with pytest.raises(InvalidRequest, match="too strong"):
        bad.future.result(60)
    assert good.future.result(60) == [0]
    assert counts(worker) == {"answered": 1, "failed": 1, "cancelled": 0, "expired": 0}


def test_a_failing_member_of_a_merged_prefill_fails_alone(worker: Worker, engine: CountingEngine) -> None:
    engine.gate.clear()
    busy = generate(worker, 2)
    _until(lambda: engine.lane.prefills == [1])
    bad = worker.submit(GenerateWork(at_once(lambda: [RowSpec((-1,), Sampling(3))]), 1, 1, 4))
    good = generate(worker, 3)
    engine.gate.set()
    assert (busy.future.result(60), good.future.result(60)) == ([0], [0])
    with pytest.raises(EngineFailed):
        bad.future.result(60)
    assert engine.lane.prefills == [1, 2, 1, 1]


def test_a_failing_step_fails_the_rows_in_it_and_the_next_request_is_served(
    worker: Worker, engine: CountingEngine
) -> None:
    engine.gate.clear()
    tickets = [generate(worker, 50), generate(worker, 60)]
    _until(lambda: engine.lane.prefills != [])
    engine.lane.is_broken = True
    engine.gate.set()
    for ticket in tickets:
        with pytest.raises(EngineFailed):
            ticket.future.result(60)
    engine.lane.is_broken = False
    assert generate(worker, 2).future.result(60) == [0]


class Weights:
    """What a future of the store gives."""

    def __init__(self) -> None:
        self.n_released = 0

    def release(self) -> None:
        self.n_released += 1


def waiting_for(awaited: Future[Any], used: list[Any]) -> Steps:
    weights = yield awaited
    used.append(weights)
    weights.release()
    return "done"


def test_work_that_waits_for_weights_does_not_keep_others_waiting(worker: Worker) -> None:
    loading: list[Future[Any]] = [Future() for _ in range(3)]
    used: list[Any] = []
    slow_call = worker.submit(CallWork(lambda: waiting_for(loading[0], used)))
    slow_capture = worker.submit(CaptureWork([[1]], [Place()], lambda seen: waiting_for(loading[1], used)))

    def prepare() -> Steps:
        yield from waiting_for(loading[2], used)
        return [RowSpec((4,), Sampling(4))]

    slow_generation = Asked(worker, GenerateWork(prepare, 1, 1, 5))
    assert worker.submit(summing([3, 4])).future.result(60) == 7
    assert generate(worker, 3).future.result(60) == [0]
    _until(lambda: worker.n_waiting == 3)
    assert not used
    weights = Weights()
    for future in loading:
        future.set_result(weights)
    assert slow_call.future.result(60) == slow_capture.future.result(60) == "done"
    assert slow_generation.future.result(60) == [0]
    assert weights.n_released == 3


def test_weights_that_cannot_be_loaded_fail_the_request_that_needs_them(worker: Worker) -> None:
    loading: Future[Any] = Future()
    ticket = worker.submit(CallWork(lambda: waiting_for(loading, [])))
    loading.set_exception(EngineFailed("gone"))
    with pytest.raises(EngineFailed, match="gone"):
        ticket.future.result(60)


@pytest.mark.parametrize("is_late", [False, True])
def test_weights_of_a_cancelled_request_are_let_go(worker: Worker, is_late: bool) -> None:
    loading: Future[Any] = Future()
    loading.set_running_or_notify_cancel()  # a load under way cannot be called off
    weights, used = Weights(), []
    ticket = worker.submit(CallWork(lambda: waiting_for(loading, used)))
    _until(lambda: len(worker._turns.waiting) == 1)
    ticket.cancel()
    if is_late:
        worker.submit(summing([1])).future.result(60)
        _until(lambda: worker.n_waiting == 0)
    loading.set_result(weights)
    with pytest.raises(CancelledError):
        ticket.future.result(60)
    _until(lambda: weights.n_released == 1)
    assert not used


def test_closing_waits_for_work_that_waits_for_weights(engine: CountingEngine) -> None:
    worker = start(engine)
    loading: Future[Any] = Future()
    ticket = worker.submit(CallWork(lambda: waiting_for(loading, [])))
    closing = threading.Thread(target=worker.close)
    closing.start()
    loading.set_result(Weights())
    closing.join(60)
    assert ticket.future.result(0) == "done"


def _raise(error: BaseException) -> None:
    raise error


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
