"""The one thread that owns the model: drain the inbox, plan a tick, carry it out."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from neuronpedia_inference.engine.faults import as_inference_error, free_caches, poisons_device
from neuronpedia_inference.engine.protocol import Engine, Generation
from neuronpedia_inference.errors import NotReady, OutOfMemory, Overloaded
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Job, Ticket, Work
from neuronpedia_inference.scheduler.policy import Limits, Tick, plan_tick

log = logging.getLogger(__name__)


class Worker:
    """Runs jobs until `close`. A job that raises fails its own ticket; a thread that dies fails all of them."""

    def __init__(self, engine: Engine, limits: Limits, *, n_threads: int, max_wait_s: float | None) -> None:
        """max_wait_s: seconds a job may wait to begin; None for ever."""
        self._engine = engine
        self._limits = limits
        self._n_threads = n_threads
        self._max_wait_s = max_wait_s
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._in_hand: list[Job] = []
        self._running: dict[int, tuple[Job, Generation]] = {}
        self._ids = itertools.count()
        self._closing = False
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.healthy = True
        self._thread = threading.Thread(target=self._main, name="inference-worker", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting) + self._inbox.qsize()

    @property
    def n_running(self) -> int:
        """Generations under way."""
        return len(self._running)

    def submit(self, work: Work, *, n_rows: int = 1, on_event: Callable[[Any], None] | None = None) -> Ticket:
        """Raises NotReady once the worker is closing or its device has failed."""
        deadline_s = None if self._max_wait_s is None else time.monotonic() + self._max_wait_s
        job = Job(next(self._ids), work, n_rows, deadline_s, Ticket(on_event))
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

    def _main(self) -> None:
        torch.set_num_threads(self._n_threads)
        try:
            with torch.inference_mode():
                while self.healthy and self._drain_inbox():
                    self._carry_out(
                        plan_tick(
                            self._waiting,
                            [job for job, _ in self._running.values()],
                            self._limits,
                            time.monotonic(),
                        )
                    )
        finally:
            self._fail_everything()

    def _drain_inbox(self) -> bool:
        """Take in new jobs, sleeping while there is nothing at all to do. False when it is time to stop."""
        idle = not self._waiting and not self._running
        if idle and self._closing and self._inbox.empty():
            return False
        arrived = [self._inbox.get()] if idle else []
        while not self._inbox.empty():
            arrived.append(self._inbox.get())
        self._waiting += [job for job in arrived if job is not None]
        return True

    def _carry_out(self, tick: Tick) -> None:
        for job in tick.cancelled:
            self._running.pop(job.id, None)
            job.ticket.abandon()
            self.counts["cancelled"] += 1
        for job in tick.expired:
            job.ticket.fail(Overloaded(f"Waited {self._max_wait_s:g} s for a turn, the most allowed. Try again soon."))
            self.counts["expired"] += 1
        self._in_hand = [*tick.run, *([tick.prefill] if tick.prefill else [])]
        gone = {job.id for job in (*tick.cancelled, *tick.expired, *self._in_hand)}
        self._waiting = [job for job in self._waiting if job.id not in gone]
        if len(tick.run) > 1:
            self._capture_together(tick.run)
        else:
            self._attempt_all(tick.run)
        self._attempt_all((*([tick.prefill] if tick.prefill else []), *tick.decode))
        self._in_hand = []

    def _capture_together(self, jobs: Sequence[Job]) -> None:
        """One forward pass for all, the same prompt once; then each job's own reduction."""
        works = [job.work for job in jobs if isinstance(job.work, CaptureWork)]
        prompts = list(dict.fromkeys(tuple(prompt) for work in works for prompt in work.prompts))
        points = {point for work in works for point in work.points}
        shared: dict[tuple[int, ...], Any] = {}
        failure = _failure_of(lambda: shared.update(zip(prompts, self._engine.capture(prompts, points), strict=True)))
        if failure is not None:
            # It says nothing about whose fault it is: each job runs alone and answers for itself.
            log.warning("a merged forward pass failed, its requests run one by one", exc_info=failure)
            free_caches()
            self._attempt_all(jobs)
            return
        self.counts["merged"] += len(jobs)
        for job, work in zip(jobs, works, strict=True):
            self._attempt(job, partial(_reduce, work, shared))

    def _attempt_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._attempt(job)

    def _attempt(self, job: Job, answer: Callable[[], Any] | None = None) -> None:
        """`answer` if there is one, else the job's next piece of work; what goes wrong ends this job and no other."""
        exc = _failure_of(partial(self._advance, job, answer))
        if exc is None:
            return
        error = as_inference_error(exc)
        if error is not exc:
            job.context.run(log.error, "job failed", exc_info=exc)
        self._running.pop(job.id, None)
        self.counts["failed"] += 1
        job.ticket.fail(error)
        self._after_fault(exc, error)

    def _after_fault(self, exc: Exception, error: Exception) -> None:
        if isinstance(error, OutOfMemory):
            free_caches()
        if poisons_device(exc):
            self.healthy = False

    def _advance(self, job: Job, answer: Callable[[], Any] | None) -> None:
        if answer is not None:
            self._finish(job, answer())
            return
        match job.work:
            case CaptureWork(prompts, points, reduce):
                self._finish(job, reduce(self._engine.capture(prompts, points)))
            case CallWork(run):
                self._finish(job, run())
            case GenerateWork():
                self._step(job, job.work)

    def _step(self, job: Job, work: GenerateWork) -> None:
        if job.id not in self._running:
            self._running[job.id] = (job, self._engine.generate(work.prepare()))
        generation = self._running[job.id][1]
        event = work.advance(generation.step())
        job.ticket.emit(event)
        if generation.done:
            del self._running[job.id]
            self._finish(job, event)

    def _finish(self, job: Job, result: Any) -> None:
        self.counts["answered"] += 1
        job.ticket.resolve(result)

    def _fail_everything(self) -> None:
        """Nobody waits on a dead worker."""
        with self._lock:
            self.healthy = False
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                self._waiting.append(job)
        for job in (*self._in_hand, *self._waiting, *(job for job, _ in self._running.values())):
            job.ticket.fail(NotReady("The server stopped before it could answer. Try again soon."))
        self._waiting.clear()
        self._running.clear()


def _reduce(work: CaptureWork, shared: Mapping[tuple[int, ...], Any]) -> Any:
    """One job's answer from what was captured for all."""
    return work.reduce([shared[tuple(prompt)] for prompt in work.prompts])


def _failure_of(work: Callable[[], Any]) -> Exception | None:
    """What `work` raised, if anything. One of the two broad handlers: no request may take the worker with it."""
    try:
        work()
    except Exception as exc:
        return exc
    return None
