"""Generations: prompts that run, rows that decode, and their tokens on the way to whoever asked."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from neuronpedia_inference.engine.faults import failure_of
from neuronpedia_inference.engine.protocol import NO_TOKEN, Engine, Joining, Lane, RowId, RowSpec, RowStep
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.scheduler.ends import Ends
from neuronpedia_inference.scheduler.jobs import GenerateWork, Job
from neuronpedia_inference.scheduler.pace import BETWEEN_STREAMED, BETWEEN_UNSEEN, Pace
from neuronpedia_inference.scheduler.policy import Stint

log = logging.getLogger(__name__)

LONG_TOKENS = 256
"""Prompts of which more is left to run let small ones go before them."""


@dataclass
class _Generation:
    """A job whose rows decode."""

    job: Job
    n_left: int
    """Rows that have not ended."""
    has_begun: bool = False
    is_parked: bool = False
    since: int = 0
    """Number of the step at which it came in or was parked."""


@dataclass(eq=False)
class _Group:
    """Jobs whose prompts run in one pass."""

    jobs: Sequence[Job]
    running: Joining | None = None
    n_run: int = 0
    """Tokens that have."""

    @property
    def n_left(self) -> int:
        """Tokens of its prompts."""
        works = [job.work for job in self.jobs if isinstance(job.work, GenerateWork)]
        return sum(work.n_rows * work.n_prompt_tokens for work in works) - self.n_run


class Generations:
    """What is known of rows is in their lane; here is only whose they are."""

    def __init__(self, engine: Engine, ends: Ends, metrics: Metrics, pace: Pace) -> None:
        self._lanes = (engine.lane, engine.reproducible_lane)
        self._ends = ends
        self._metrics = metrics
        self._pace = pace
        self._rows: dict[int, Sequence[RowSpec]] = {}
        """Of jobs that have not joined."""
        self._groups: deque[_Group] = deque()
        self._has_gone_on = True
        """The oldest of them, since another went before it."""
        self._decoding: dict[int, _Generation] = {}
        """And parked ones; who came in or was parked last is last."""
        self.n_steps = 0
        """That have been made."""

    @property
    def joining(self) -> list[Job]:
        return [job for group in self._groups for job in group.jobs]

    @property
    def can_be_passed(self) -> bool:
        """Whether small prompts may run before those that do now. A stream of them does not hold those up for ever."""
        return len(self._groups) == 1 and self._has_gone_on and self._groups[0].n_left > LONG_TOKENS

    @property
    def decoding(self) -> list[Stint]:
        return self._stints(is_parked=False)

    @property
    def parked(self) -> list[Stint]:
        return self._stints(is_parked=True)

    @property
    def inside(self) -> bool:
        return bool(self._groups or self._decoding)

    def prepared(self, job: Job, rows: Sequence[RowSpec]) -> None:
        """What the job wants to have generated, once it is its turn."""
        self._rows[job.id] = rows

    def begin(self, jobs: Sequence[Job]) -> None:
        """The prompts of these jobs, which are prepared, run in one pass, before those that run now."""
        self._has_gone_on = not self._groups
        self._groups.appendleft(_Group(jobs))

    @property
    def steps_between(self) -> float | None:
        """Time for everything else between two steps, in steps; None where nothing decodes."""
        works = [stint.job.work for stint in self.decoding]
        if not works:
            return None
        streams = any(isinstance(work, GenerateWork) and work.streams for work in works)
        return BETWEEN_STREAMED if streams else BETWEEN_UNSEEN

    def advance(self, most: int) -> None:
        """One piece of the first group, of at most so many tokens; fewer where rows wait for it to decode."""
        group = self._groups[0]
        self._has_gone_on = len(self._groups) == 1
        failure = failure_of(lambda: self._piece(group, most))
        if failure is not None:
            self._remove(group)
            alone = self._ends.alone(group.jobs, failure)
            self._groups.extendleft(_Group([job]) for job in reversed(alone))

    def park(self, jobs: Sequence[Job]) -> None:
        """Their rows keep their places in the cache and draw nothing."""
        self._set_parked(jobs, True)

    def resume(self, jobs: Sequence[Job]) -> None:
        """Those who are parked decode again."""
        self._set_parked(jobs, False)

    def decode(self) -> None:
        """One token for every row that is not parked."""
        started = time.perf_counter()
        for lane in self._lanes:
            self._drop_strangers(lane)
        stepped = [self._step(lane) for lane in self._lanes if lane.decoding]
        if any(stepped):
            self._pace.stepped(time.perf_counter() - started)
        self.n_steps += 1

    def forget(self, job: Job) -> None:
        """Its rows leave at once; prompts that nobody waits for any more are not run on."""
        self._rows.pop(job.id, None)
        if self._decoding.pop(job.id, None) is not None:
            lane = self._lane_of(job)
            lane.drop({row for row in lane.rows if row.job == job.id})
        self._groups = deque(group for group in self._groups if not all(one.has_ended for one in group.jobs))

    # Prompts

    def _piece(self, group: _Group, most: int) -> None:
        running = group.running = group.running or self._lane_of(group.jobs[0]).begin(self._new_rows(group))
        started = time.perf_counter()
        weight = running.weight
        n_run = running.advance(self._pace.tokens(weight, max(1, int(most / weight)), self.steps_between))
        group.n_run += n_run
        self._pace.passed(n_run, weight, time.perf_counter() - started)
        if running.is_done:
            steps = running.join()
            self._remove(group)
            self._metrics.prefilled(len(self._new_rows(group)), running.n_tokens - running.n_padding, running.n_padding)
            self._join(group, steps)

    def _remove(self, group: _Group) -> None:
        self._groups = deque(one for one in self._groups if one is not group)

    def _new_rows(self, group: _Group) -> list[tuple[RowId, RowSpec]]:
        jobs = [job for job in group.jobs if not job.has_ended]
        return [(RowId(job.id, n), spec) for job in jobs for n, spec in enumerate(self._rows[job.id])]

    def _join(self, group: _Group, steps: Sequence[RowStep]) -> None:
        for job in (job for job in group.jobs if not job.has_ended):
            self._decoding[job.id] = _Generation(job, n_left=len(self._rows.pop(job.id)), since=self.n_steps)
        self._deliver(steps)

    # Steps

    def _step(self, lane: Lane) -> bool:
        """Whether there was one. What fails is tried once more: what ran out of memory beside it may have left."""
        steps: list[RowStep] = []
        for is_last in (False, True):
            failure = failure_of(lambda: steps.extend(lane.decode()))
            if failure is None:
                self._metrics.decoded(len({step.row for step in steps}))
                self._deliver(steps)
                return True
            if is_last or not self._ends.give_up(failure):
                for number in {row.job for row in lane.decoding}:
                    self._ends.fail(self._decoding[number].job, failure)
                return False
            log.warning("a decode step failed and is tried once more", exc_info=failure)
        return False

    def _lane_of(self, job: Job) -> Lane:
        assert isinstance(job.work, GenerateWork)
        return self._lanes[job.work.reproducible]

    def _stints(self, *, is_parked: bool) -> list[Stint]:
        found = [one for one in self._decoding.values() if one.is_parked == is_parked]
        return [Stint(one.job, self.n_steps - one.since) for one in found]

    def _set_parked(self, jobs: Sequence[Job], is_parked: bool) -> None:
        for job in jobs:
            lane = self._lane_of(job)
            generation = self._decoding.pop(job.id)
            generation.is_parked, generation.since = is_parked, self.n_steps
            self._decoding[job.id] = generation
            change = lane.park if is_parked else lane.resume
            change({row for row in lane.rows if row.job == job.id})

    def _drop_strangers(self, lane: Lane) -> None:
        """Rows of jobs that are not here any more, if there should ever be any."""
        strangers = {row for row in lane.rows if row.job not in self._decoding}
        if strangers:
            lane.drop(strangers)

    def _deliver(self, steps: Sequence[RowStep]) -> None:
        for number, own in groupby(sorted(steps, key=lambda step: step.row), lambda step: step.row.job):
            generation = self._decoding.get(number)
            if generation is not None:
                self._ends.attempt(generation.job, partial(self._take, generation, list(own)))

    def _take(self, generation: _Generation, steps: Sequence[RowStep]) -> None:
        """Raises what ended a row, which ends its job: of two at once not the one that blames the caller."""
        errors = [step.error for step in steps if step.error is not None]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, InvalidRequest))
        job = generation.job
        if not generation.has_begun:
            generation.has_begun = True
            self._metrics.first_token(time.monotonic() - job.submitted_s)
        told = [step for step in steps if step.says_something]
        self._metrics.told(sum(step.token_id != NO_TOKEN for step in told))
        if told:
            job.ticket.emit(told)
        generation.n_left -= sum(step.ends for step in steps)
        if generation.n_left == 0:
            self._ends.answer(job)
