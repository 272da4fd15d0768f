"""Work that goes step by step: it waits for weights without holding up others, and gives way between steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from neuronpedia_inference.scheduler.ends import Ends
from neuronpedia_inference.scheduler.jobs import CallWork, Job, Steps


@dataclass(eq=False)
class _Turn:
    job: Job
    steps: Steps
    done: Callable[[Any], None]
    """Gets what the steps return."""
    awaited: Future[Any] | None = None


class Turns:
    """The oldest goes first, to its end or to where it has to wait; what is done aside goes on beside them."""

    def __init__(self, ends: Ends, wake: Callable[[], None]) -> None:
        """`wake` is called, on any thread, when what somebody waits for is there."""
        self._ends = ends
        self._wake = wake
        self._ready: deque[_Turn] = deque()
        self._aside: deque[_Turn] = deque()
        self._waiting: list[_Turn] = []

    @property
    def ready(self) -> list[Job]:
        return [turn.job for turn in self._ready]

    @property
    def aside(self) -> list[Job]:
        """Those who hold up nobody."""
        return [turn.job for turn in self._aside]

    @property
    def waiting(self) -> list[Job]:
        """Those who wait for weights."""
        return [turn.job for turn in self._waiting]

    def add(self, job: Job, steps: Steps, done: Callable[[Any], None]) -> None:
        self._queue_of(job).append(_Turn(job, steps, done))

    def at_once(self, job: Job, steps: Steps, done: Callable[[Any], None]) -> None:
        """As `add`, but run now, before all others."""
        turn = _Turn(job, steps, done)
        self._ready.appendleft(turn)
        while self._ready and self._ready[0] is turn:
            self._ends.attempt(job, partial(self._step, turn))

    def run(self, seconds: float) -> None:
        """At least one step, then more until the time is up."""
        until = time.perf_counter() + seconds
        while self._ready:
            turn = self._ready[0]
            self._ends.attempt(turn.job, partial(self._step, turn))
            if time.perf_counter() >= until:
                return

    def step_aside(self) -> None:
        """One step of the oldest that is done aside."""
        turn = self._aside[0]
        self._ends.attempt(turn.job, partial(self._step, turn))

    def resume(self) -> None:
        """Whoever waited for what is there now is ready again."""
        there = [turn for turn in self._waiting if turn.awaited is not None and turn.awaited.done()]
        self._waiting = [turn for turn in self._waiting if turn not in there]
        for turn in there:
            self._queue_of(turn.job).append(turn)

    def forget(self, job: Job) -> None:
        """Its steps are closed, and what it waits for is given back when it comes."""
        for turn in [turn for turn in (*self._ready, *self._aside, *self._waiting) if turn.job is job]:
            self._remove(turn)
            turn.steps.close()
            if turn.awaited is not None:
                _let_go(turn.awaited)

    def _step(self, turn: _Turn) -> None:
        """Raises what the steps raise."""
        awaited, turn.awaited = turn.awaited, None
        try:
            needed = next(turn.steps) if awaited is None else _send(turn.steps, awaited)
        except StopIteration as end:
            self._remove(turn)
            turn.done(end.value)
            return
        turn.awaited = needed
        if needed is not None and not needed.done():
            self._remove(turn)
            self._waiting.append(turn)
            needed.add_done_callback(lambda _: self._wake())

    def _queue_of(self, job: Job) -> deque[_Turn]:
        return self._aside if isinstance(job.work, CallWork) and job.work.is_aside else self._ready

    def _remove(self, turn: _Turn) -> None:
        self._ready = deque(one for one in self._ready if one is not turn)
        self._aside = deque(one for one in self._aside if one is not turn)
        self._waiting = [one for one in self._waiting if one is not turn]


def _send(steps: Steps, awaited: Future[Any]) -> Future[Any] | None:
    """Give `steps` what it waited for, or raise in it what went wrong."""
    error = awaited.exception()
    return steps.send(awaited.result()) if error is None else steps.throw(error)


def _let_go(awaited: Future[Any]) -> None:
    """Give back what nobody takes any more, now or when it comes."""
    if not awaited.cancel():
        awaited.add_done_callback(lambda done: done.exception() or done.result().release())
