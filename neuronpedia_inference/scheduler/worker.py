"""The one thread that owns the model: drain the inbox, plan a tick, carry it out."""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from neuronpedia_inference.engine.protocol import Engine
from neuronpedia_inference.errors import NotReady, Overloaded
from neuronpedia_inference.exits import HALT_S
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.scheduler.ends import Ends
from neuronpedia_inference.scheduler.generations import Generations
from neuronpedia_inference.scheduler.jobs import CallWork, GenerateWork, Job, Ticket, Work
from neuronpedia_inference.scheduler.pace import BETWEEN_STREAMED, Pace
from neuronpedia_inference.scheduler.policy import Limits, Tick, UnderWay, plan_tick
from neuronpedia_inference.scheduler.readings import Readings
from neuronpedia_inference.scheduler.turns import Turns

LINGER_S = 0.01
"""How long those who shared a pass have to ask again, so that they share the next one too."""
TURN_S = 0.25
"""For how long reductions run before the inbox is looked at again, while nothing decodes."""
PAUSE_S, AT_WORK_S = 1.0, 30.0
"""Seconds without anything to do, and of work without such a pause, until what was freed goes back to the system."""


class Worker:
    """Runs jobs until `close`. A job that raises fails its own ticket; a thread that dies fails all of them."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        *,
        n_threads: int,
        max_wait_s: float | None,
        metrics: Metrics,
        give_back: Callable[[], None] = lambda: None,
    ) -> None:
        """max_wait_s: seconds a job may wait to begin; None for ever. give_back: gives freed memory to the system."""
        self._engine = engine
        self._limits = limits
        self._n_threads = n_threads
        self._max_wait_s = max_wait_s
        self._give_back = give_back
        self._at_work_since_s: float | None = None
        """None once what was freed has been given back, and nothing was done since."""
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._starting: list[Job] = []
        """Taken from those that wait, and not yet in anyone's hands."""
        pace = Pace()
        self._ends = Ends(metrics)
        self._turns = Turns(self._ends, partial(self._inbox.put, None))
        self._readings = Readings(engine, self._ends, self._turns, metrics, pace)
        self._generations = Generations(engine, self._ends, metrics, pace)
        self._ends.forget = (self._turns.forget, self._readings.forget, self._generations.forget)
        self._pace = pace
        self._n_expected, self._expected_until_s = 0, 0.0
        """How many may share the next pass of captures, and how long they are waited for."""
        self._pieces = deque([self._join_piece, self._turn, self._read_piece, self._aside_piece])
        """What is not decoding; the first comes first after the next step."""
        self._ids = itertools.count()
        self._closing = self._is_halted = False
        self._lock = threading.Lock()
        self.healthy = True
        self._thread = threading.Thread(target=self._main, name="inference-worker", daemon=True)
        self._thread.start()
        atexit.register(self._halt)

    @property
    def n_waiting(self) -> int:
        """Jobs that have not begun, or wait for weights."""
        return len(self._waiting) + len(self._turns.waiting) + self._inbox.qsize()

    @property
    def n_running(self) -> int:
        """Generations under way, parked ones too."""
        return len(self._generations.decoding) + self.n_parked

    @property
    def n_parked(self) -> int:
        """Generations that have made way for others."""
        return len(self._generations.parked)

    @property
    def n_rows(self) -> int:
        """Rows that decode."""
        return len(self._engine.lane.decoding) + len(self._engine.reproducible_lane.decoding)

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
        atexit.unregister(self._halt)

    def _halt(self) -> None:
        """The process ends: nothing more begins. An interpreter that ends beside a thread in native code is aborted."""
        self._is_halted = True
        self._inbox.put(None)
        self._thread.join(HALT_S)

    def _main(self) -> None:
        torch.set_num_threads(self._n_threads)
        try:
            with torch.inference_mode():
                while not (self._ends.device_failed or self._is_halted) and self._drain_inbox():
                    self._linger()
                    self._turns.resume()
                    self._carry_out(plan_tick(self._waiting, self._under_way, self._limits, time.monotonic()))
                    self._note_work()
        finally:
            self._fail_everything()

    # The inbox

    def _drain_inbox(self) -> bool:
        """Take in new jobs, sleeping while there is nothing at all to do. False when it is time to stop.

        While rows decode, for no longer than a step takes: edits are made ready here, and others come after the next.
        """
        begun = self._turns.ready or self._turns.aside or self._readings.jobs or self._generations.inside
        idle = not (self._waiting or begun)
        if idle and self._closing and self._inbox.empty() and not self._turns.waiting:
            return False
        if idle:
            self._accept(self._next())
        until = time.monotonic() + self._pace.between_s(BETWEEN_STREAMED)
        while not self._inbox.empty() and not (self._generations.decoding and time.monotonic() > until):
            self._accept(self._inbox.get())
        return True

    def _next(self) -> Job | None:
        """What comes next, however late."""
        if self._at_work_since_s is not None:
            with suppress(queue.Empty):
                return self._inbox.get(timeout=PAUSE_S)
            self._at_work_since_s = None
            self._give_back()
        return self._inbox.get()

    def _note_work(self) -> None:
        """Blocks of many sizes leave gaps, which would grow as long as nobody pauses."""
        now_s = time.monotonic()
        if self._at_work_since_s is None:
            self._at_work_since_s = now_s
        elif now_s - self._at_work_since_s > AT_WORK_S:
            self._at_work_since_s = now_s
            self._give_back()

    def _linger(self) -> None:
        """Callers who were answered together ask again within a moment: the first of them does not run ahead alone.

        A caller who comes alone, or finds something under way, never waits here.
        """
        while not (self._generations.inside or self._reading) and 0 < len(self._waiting) < self._n_expected:
            left_s = self._expected_until_s - time.monotonic()
            if left_s <= 0:
                return
            with suppress(queue.Empty):
                self._accept(self._inbox.get(timeout=left_s))

    def _accept(self, job: Job | None) -> None:
        """What is edited takes its turn once its vectors are there; everything else at once. None only wakes."""
        if job is None:
            return
        job.came_at = self._generations.n_steps
        prepare = None if isinstance(job.work, CallWork) else job.work.prepare
        if prepare is not None:
            self._ends.attempt(job, lambda: self._turns.at_once(job, prepare(), partial(self._prepared, job)))
        else:
            self._ends.attempt(job, lambda: self._begin_or_wait(job))

    def _begin_or_wait(self, job: Job) -> None:
        if not self._readings.begin_known(job):
            self._waiting.append(job)

    def _prepared(self, job: Job, rows: Any) -> None:
        hands = self._generations if isinstance(job.work, GenerateWork) else self._readings
        hands.prepared(job, rows)
        self._waiting.append(job)
        self._waiting.sort(key=lambda one: one.id)

    # A tick

    @property
    def _reading(self) -> list[Job]:
        """Those who have begun, and can go on."""
        return [*self._readings.jobs, *self._turns.ready]

    @property
    def _under_way(self) -> UnderWay:
        inside = self._generations
        return UnderWay(
            reading=self._reading,
            joining=inside.joining,
            can_be_passed=inside.can_be_passed,
            decoding=inside.decoding,
            parked=inside.parked,
            paused=[*self._turns.waiting, *self._turns.aside],
        )

    def _carry_out(self, tick: Tick) -> None:
        for job in tick.cancelled:
            self._ends.cancel(job)
        for job in tick.expired:
            waited = Overloaded(f"Waited {self._max_wait_s:g} s for a turn, the most allowed. Try again soon.")
            self._ends.end(job, "expired", partial(job.ticket.fail, waited))
        self._starting = [*tick.run, *tick.prefill]
        gone = {job.id for job in (*tick.cancelled, *tick.expired, *self._starting)}
        self._waiting = [job for job in self._waiting if job.id not in gone]
        self._readings.begin(tick.run)
        self._generations.park(tick.park)
        self._generations.resume(tick.resume)
        if tick.prefill:
            self._generations.begin(tick.prefill)
        self._starting = []
        self._run_pieces()
        self._generations.decode()

    def _run_pieces(self) -> None:
        """While rows decode, one piece of what does not, of about a step's time; else one of each kind."""
        were_reading = bool(self._reading)
        self._pieces.rotate(1)
        for piece in self._pieces:
            if piece() and self._generations.decoding:
                break
        if were_reading and not self._reading:
            self._expect(self._readings.shared_lately)

    def _expect(self, n_shared: int) -> None:
        """With one who came too late for the last pass, the next is larger by one."""
        self._n_expected = n_shared + min(1, self.n_waiting) if n_shared > 1 else 0
        self._expected_until_s = time.monotonic() + LINGER_S

    def _join_piece(self) -> bool:
        """Whether there was one."""
        if not self._generations.joining:
            return False
        self._generations.advance(self._limits.max_prefill_tokens)
        return True

    def _read_piece(self) -> bool:
        """Whether there was one."""
        if not self._readings.jobs:
            return False
        self._readings.advance(self._limits.max_capture_tokens, self._generations.steps_between)
        return True

    def _turn(self) -> bool:
        """Whether there was one."""
        if not self._turns.ready:
            return False
        steps = self._generations.steps_between
        self._turns.run(TURN_S if steps is None else self._pace.between_s(steps))
        return True

    def _aside_piece(self) -> bool:
        """Whether there was one."""
        if not self._turns.aside:
            return False
        self._turns.step_aside()
        return True

    def _fail_everything(self) -> None:
        """Nobody waits on a dead worker."""
        with self._lock:
            self.healthy = False
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                self._waiting.append(job)
        inside = self._under_way
        stints = [stint.job for stint in (*inside.decoding, *inside.parked)]
        begun = (*inside.reading, *inside.joining, *stints, *inside.paused)
        self._ends.forget = ()  # nothing runs here any more, and on a broken device even forgetting may raise
        for job in (*self._starting, *self._waiting, *begun):
            stopped = NotReady("The server stopped before it could answer. Try again soon.")
            self._ends.end(job, "failed", partial(job.ticket.fail, stopped))
        self._waiting.clear()
