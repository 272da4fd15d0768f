"""The one thread that owns the model: drain the inbox, plan a tick, carry it out."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

from neuronpedia_inference.engine.faults import as_inference_error, free_caches, poisons_device
from neuronpedia_inference.engine.protocol import Engine, Lane, RowId, RowSpec, RowStep
from neuronpedia_inference.errors import NotReady, OutOfMemory, Overloaded
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Job, Steps, Ticket, Work
from neuronpedia_inference.scheduler.policy import Limits, Tick, plan_tick

log = logging.getLogger(__name__)

LINGER_S = 0.01
"""How long those who shared a pass have to ask again, so that they share the next one too."""


@dataclass
class _Generation:
    """A job whose rows are in a lane."""

    job: Job
    work: GenerateWork
    lane: Lane
    n_left: int
    """Rows that have not ended."""
    has_begun: bool = False


@dataclass(frozen=True)
class _Paused:
    """A job that waits for weights."""

    job: Job
    steps: Steps
    awaited: Future[Any]


class Worker:
    """Runs jobs until `close`. A job that raises fails its own ticket; a thread that dies fails all of them."""

    def __init__(
        self, engine: Engine, limits: Limits, *, n_threads: int, max_wait_s: float | None, metrics: Metrics
    ) -> None:
        """max_wait_s: seconds a job may wait to begin; None for ever."""
        self._engine = engine
        self._limits = limits
        self._n_threads = n_threads
        self._max_wait_s = max_wait_s
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._rows: dict[int, Sequence[RowSpec]] = {}
        """Of generations that wait for their turn."""
        self._paused: dict[int, _Paused] = {}
        self._in_hand: list[Job] = []
        self._running: dict[int, _Generation] = {}
        self._n_expected, self._expected_until_s = 0, 0.0
        """How many may share the next pass of captures, and how long they are waited for."""
        self._ids = itertools.count()
        self._closing = False
        self._lock = threading.Lock()
        self.healthy = True
        self._thread = threading.Thread(target=self._main, name="inference-worker", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Jobs that have not begun, or wait for weights."""
        return len(self._waiting) + len(self._paused) + self._inbox.qsize()

    @property
    def n_running(self) -> int:
        """Generations under way."""
        return len(self._running)

    @property
    def n_rows(self) -> int:
        """Rows that decode."""
        return sum(len(lane.rows) for lane in self._engine.lanes)

    def submit(self, work: Work, *, on_event: Callable[[Any], None] | None = None) -> Ticket:
        """Raises NotReady once the worker is closing or its device has failed."""
        now_s = time.monotonic()
        deadline_s = None if self._max_wait_s is None else now_s + self._max_wait_s
        job = Job(next(self._ids), work, now_s, deadline_s, Ticket(on_event))
        with self._lock:
            if self._closing or not self.healthy:
                raise NotReady("The server is stopping and takes no more requests.")
            self._inbox.put(job)
        return job.ticket

    def close(self) -> None:
        """Finish what is inside, then stop the thread."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        self._thread.join()

    # The loop

    def _main(self) -> None:
        torch.set_num_threads(self._n_threads)
        try:
            with torch.inference_mode():
                while self.healthy and self._drain_inbox():
                    self._linger()
                    self._resume_paused()
                    running = [generation.job for generation in self._running.values()]
                    self._carry_out(plan_tick(self._waiting, running, self._limits, time.monotonic()))
        finally:
            self._fail_everything()

    def _drain_inbox(self) -> bool:
        """Take in new jobs, sleeping while there is nothing at all to do. False when it is time to stop."""
        idle = not self._waiting and not self._running
        if idle and self._closing and self._inbox.empty() and not self._paused:
            return False
        if idle:
            self._accept(self._inbox.get())
        while not self._inbox.empty():
            self._accept(self._inbox.get())
        return True

    def _linger(self) -> None:
        """Callers who were answered together ask again within a moment: the first of them does not run ahead alone.

        A caller who comes alone, or finds a generation running, never waits here.
        """
        while not self._running and 0 < len(self._waiting) < self._n_expected:
            left_s = self._expected_until_s - time.monotonic()
            if left_s <= 0:
                return
            with suppress(queue.Empty):
                self._accept(self._inbox.get(timeout=left_s))

    def _accept(self, job: Job | None) -> None:
        """A generation takes its turn once its vectors are there; everything else at once. None only wakes."""
        if job is None:
            return
        if isinstance(job.work, GenerateWork):
            self._attempt(job, partial(self._go_on, job, job.work.prepare()))
        else:
            self._waiting.append(job)

    def _carry_out(self, tick: Tick) -> None:
        for job in tick.cancelled:
            self._cancel(job)
        for job in tick.expired:
            waited = Overloaded(f"Waited {self._max_wait_s:g} s for a turn, the most allowed. Try again soon.")
            self._end(job, "expired", partial(job.ticket.fail, waited))
        self._in_hand = [*tick.run, *tick.prefill]
        gone = {job.id for job in (*tick.cancelled, *tick.expired, *self._in_hand)}
        self._waiting = [job for job in self._waiting if job.id not in gone]
        self._run(tick.run)
        self._prefill(tick.prefill)
        self._in_hand = []
        self._decode()

    # Calls and captures

    def _run(self, jobs: Sequence[Job]) -> None:
        captures = [(job, job.work) for job in jobs if isinstance(job.work, CaptureWork)]
        if captures:
            self._capture(captures)
        for job in jobs:
            if isinstance(job.work, CallWork):
                self._attempt(job, partial(self._go_on, job, job.work.run()))

    def _capture(self, jobs: Sequence[tuple[Job, CaptureWork]]) -> None:
        """One forward pass for all, the same prompt once; then each job's own reduction."""
        prompts = list(dict.fromkeys(tuple(prompt) for _, work in jobs for prompt in work.prompts))
        points = {point for _, work in jobs for point in work.points}
        shared: dict[tuple[int, ...], Any] = {}
        failure = _failure_of(lambda: shared.update(zip(prompts, self._engine.capture(prompts, points), strict=True)))
        if failure is not None:
            self._one_by_one([job for job, _ in jobs], failure, lambda n: self._capture([jobs[n]]))
            return
        lengths = [len(prompt) for prompt in prompts]
        self._metrics.captured(len(jobs), sum(lengths), len(lengths) * max(lengths) - sum(lengths))
        for job, work in jobs:
            self._attempt(job, partial(self._go_on, job, _reduction(work, shared)))
        # With one who came too late for this pass, the next is larger by one.
        self._n_expected = len(jobs) + min(1, self.n_waiting) if len(jobs) > 1 else 0
        self._expected_until_s = time.monotonic() + LINGER_S

    def _one_by_one(self, jobs: Sequence[Job], failure: Exception, again: Callable[[int], None]) -> None:
        """A merged pass that failed says nothing about whose fault it is: each job runs alone and answers for it."""
        if len(jobs) == 1:
            self._fail(jobs[0], failure)
            return
        log.warning("a merged forward pass failed, its requests run one by one", exc_info=failure)
        free_caches()
        for number in range(len(jobs)):
            if not poisons_device(failure):
                again(number)
            else:
                self._fail(jobs[number], failure)

    # Generations

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """One forward pass for the new rows of each lane."""
        by_lane: dict[int, list[_Generation]] = defaultdict(list)
        for job in jobs:
            assert isinstance(job.work, GenerateWork)
            lane = self._engine.lane(self._rows[job.id])
            by_lane[id(lane)].append(_Generation(job, job.work, lane, job.work.n_rows))
        for generations in by_lane.values():
            self._join(generations)

    def _join(self, generations: Sequence[_Generation]) -> None:
        lane = generations[0].lane
        new = [(RowId(g.job.id, n), spec) for g in generations for n, spec in enumerate(self._rows[g.job.id])]
        steps: list[RowStep] = []
        failure = _failure_of(lambda: steps.extend(lane.prefill(new)))
        if failure is not None:
            jobs = [generation.job for generation in generations]
            self._one_by_one(jobs, failure, lambda n: self._join([generations[n]]))
            return
        lengths = [len(spec.prompt_ids) for _, spec in new]
        self._metrics.prefilled(len(new), sum(lengths), len(lengths) * max(lengths) - sum(lengths))
        for generation in generations:
            del self._rows[generation.job.id]
            self._running[generation.job.id] = generation
        self._deliver(steps)

    def _decode(self) -> None:
        for lane in self._engine.lanes:
            rows = list(lane.rows)
            if rows:
                steps: list[RowStep] = []
                failure = _failure_of(lambda lane=lane, steps=steps: steps.extend(lane.decode()))
                if failure is not None:
                    for number in {row.job for row in rows}:
                        self._fail(self._running[number].job, failure)
                else:
                    self._metrics.decoded(len(rows))
                    self._deliver(steps)

    def _deliver(self, steps: Sequence[RowStep]) -> None:
        for number, own in groupby(sorted(steps, key=lambda step: step.row), lambda step: step.row.job):
            generation = self._running[number]
            self._attempt(generation.job, partial(self._advance, generation, list(own)))

    def _advance(self, generation: _Generation, steps: Sequence[RowStep]) -> None:
        """Raises what ended a row, which ends its job."""
        for step in steps:
            if step.error is not None:
                raise step.error
        job = generation.job
        if not generation.has_begun:
            generation.has_begun = True
            self._metrics.first_token(time.monotonic() - job.submitted_s)
        event = generation.work.advance(steps)
        job.ticket.emit(event)
        generation.n_left -= sum(step.ends for step in steps)
        if generation.n_left == 0:
            self._end(job, "answered", partial(job.ticket.resolve, event))

    # Work that waits for weights

    def _go_on(self, job: Job, steps: Steps, awaited: Future[Any] | None = None) -> None:
        """Run `steps` to the end, or to where it needs what is not there yet. Raises what it raises."""
        try:
            while True:
                needed = next(steps) if awaited is None else _send(steps, awaited)
                if needed is not None and not needed.done():
                    self._paused[job.id] = _Paused(job, steps, needed)
                    needed.add_done_callback(lambda _: self._inbox.put(None))
                    return
                awaited = needed
        except StopIteration as end:
            self._finish(job, end.value)

    def _finish(self, job: Job, result: Any) -> None:
        if isinstance(job.work, GenerateWork):
            self._rows[job.id] = result
            self._waiting.append(job)
            self._waiting.sort(key=lambda one: one.id)
        else:
            self._end(job, "answered", partial(job.ticket.resolve, result))

    def _resume_paused(self) -> None:
        for paused in list(self._paused.values()):
            if paused.job.ticket.cancelled:
                self._cancel(paused.job)
            elif paused.awaited.done():
                del self._paused[paused.job.id]
                self._attempt(paused.job, partial(self._go_on, paused.job, paused.steps, paused.awaited))

    # Ends

    def _attempt(self, job: Job, work: Callable[[], None]) -> None:
        """What goes wrong ends this job and no other."""
        failure = _failure_of(work)
        if failure is not None:
            self._fail(job, failure)

    def _fail(self, job: Job, failure: Exception) -> None:
        error = as_inference_error(failure)
        if error is not failure:
            job.context.run(log.error, "job failed", exc_info=failure)
        self._end(job, "failed", partial(job.ticket.fail, error))
        if isinstance(error, OutOfMemory):
            free_caches()
        if poisons_device(failure):
            self.healthy = False

    def _cancel(self, job: Job) -> None:
        self._end(job, "cancelled", job.ticket.abandon)

    def _end(self, job: Job, outcome: str, tell: Callable[[], None]) -> None:
        """Take the job out of what waits and runs, count it, tell its caller, and free its rows."""
        self._rows.pop(job.id, None)
        paused = self._paused.pop(job.id, None)
        if paused is not None:
            paused.steps.close()
            _let_go(paused.awaited)
        generation = self._running.pop(job.id, None)
        self._metrics.ended(outcome)
        tell()
        # Last, because on a broken device even this may raise, and then the caller has been told.
        if generation is not None and generation.n_left:
            generation.lane.drop({RowId(job.id, n) for n in range(generation.work.n_rows)})

    def _fail_everything(self) -> None:
        """Nobody waits on a dead worker."""
        with self._lock:
            self.healthy = False
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                self._waiting.append(job)
        running = [generation.job for generation in self._running.values()]
        paused = [one.job for one in self._paused.values()]
        for job in {job.id: job for job in (*self._in_hand, *self._waiting, *paused, *running)}.values():
            stopped = NotReady("The server stopped before it could answer. Try again soon.")
            self._running.pop(job.id, None)  # its rows stay where they are: nothing runs here any more
            self._end(job, "failed", partial(job.ticket.fail, stopped))
        self._waiting.clear()


def _reduction(work: CaptureWork, shared: Mapping[tuple[int, ...], Any]) -> Steps:
    """One job's answer from what was captured for all."""
    return work.reduce([shared[tuple(prompt)] for prompt in work.prompts])


def _send(steps: Steps, awaited: Future[Any]) -> Future[Any] | None:
    """Give `steps` what it waited for, or raise in it what went wrong."""
    error = awaited.exception()
    return steps.send(awaited.result()) if error is None else steps.throw(error)


def _let_go(awaited: Future[Any]) -> None:
    """Give back what nobody takes any more, now or when it comes."""
    if not awaited.cancel():
        awaited.add_done_callback(lambda done: done.exception() or done.result().release())


def _failure_of(work: Callable[[], Any]) -> Exception | None:
    """What `work` raised, if anything. One of the two broad handlers: no request may take the worker with it."""
    try:
        work()
    except Exception as exc:
        return exc
    return None
