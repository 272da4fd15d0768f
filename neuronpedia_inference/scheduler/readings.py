"""Captures and calls: forward passes that are only read, and what is made of them.

What a pass has shown of a prompt is kept for a while. Who asks for it again, for another feature or another SAE of the
same place, gets it without a pass. What edits a prompt is its job's own, so those are run for it, beside others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from neuronpedia_inference.engine.faults import failure_of
from neuronpedia_inference.engine.protocol import Captured, Capturing, Engine, RowSpec, only_read
from neuronpedia_inference.errors import let_go
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.scheduler.ends import Ends
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, Job
from neuronpedia_inference.scheduler.pace import Pace
from neuronpedia_inference.scheduler.turns import Turns


@dataclass(frozen=True)
class _Pass:
    """One forward pass for several jobs, the same row once."""

    jobs: Sequence[Job]
    rows: Sequence[RowSpec]
    """Those that run."""
    known: Mapping[RowSpec, Captured]
    """What is known of others."""
    running: Capturing


class Readings:
    """One pass at a time; every job's reduction runs on its own, in turns."""

    def __init__(self, engine: Engine, ends: Ends, turns: Turns, metrics: Metrics, pace: Pace) -> None:
        self._engine = engine
        self._ends = ends
        self._turns = turns
        self._metrics = metrics
        self._pace = pace
        self._edited: dict[int, Sequence[RowSpec]] = {}
        """Rows of jobs whose prompts are edited."""
        self._groups: deque[Sequence[Job]] = deque()
        """Whose passes have yet to begin."""
        self._pass: _Pass | None = None
        self.shared_lately = 0
        """Jobs of the last pass, if they were several."""

    @property
    def jobs(self) -> list[Job]:
        """Those of passes; reductions are the turns' business."""
        passing = () if self._pass is None else self._pass.jobs
        return [job for group in (*self._groups, passing) for job in group]

    def prepared(self, job: Job, rows: Sequence[RowSpec]) -> None:
        """How its prompts are edited."""
        self._edited[job.id] = rows

    def begin_known(self, job: Job) -> bool:
        """Whether it is a capture of which all is known: it needs no pass, and its reduction begins."""
        work = job.work
        if not isinstance(work, CaptureWork) or work.reproducible:
            return False
        rows = set(self._rows(job))
        if not all(self._knows(row, work.points) for row in rows):
            return False
        self._add_reduction(job, {row: self._known(row, work.points) for row in rows})
        return True

    def begin(self, jobs: Sequence[Job]) -> None:
        """A call, or captures that share a pass."""
        for job in jobs:
            if isinstance(job.work, CallWork):
                self._turns.add(job, job.work.run(), partial(self._ends.answer, job))
        captures = [job for job in jobs if isinstance(job.work, CaptureWork)]
        if captures:
            self._groups.append(captures)

    def advance(self, most: int, steps: float | None) -> None:
        """One piece of the oldest pass, of at most so many tokens, in the time of `steps` (None for any)."""
        if self._pass is None:
            jobs = self._groups[0]
            failure = failure_of(lambda: self._start(jobs))
            self._groups.popleft()
        else:
            jobs = self._pass.jobs
            failure = failure_of(lambda: self._piece(most, steps))
        if failure is not None:
            self._pass = None
            alone = self._ends.alone(jobs, failure)
            self._groups.extendleft([job] for job in reversed(alone))

    def forget(self, job: Job) -> None:
        """A pass that nobody waits for any more is not run on."""
        self._edited.pop(job.id, None)
        groups = ([one for one in group if one is not job] for group in self._groups)
        self._groups = deque(group for group in groups if group)
        if self._pass is not None and all(one.has_ended for one in self._pass.jobs):
            self._pass = None

    def _start(self, jobs: Sequence[Job]) -> None:
        if _work(jobs[0]).reproducible:
            rows = list(dict.fromkeys(self._rows(jobs[0])))
            running = self._engine.begin_capture(rows, set(_work(jobs[0]).points), reproducible=True)
            self._pass = _Pass(jobs, rows, {}, running)
            return
        wanted: dict[RowSpec, set[Any]] = {}
        for job in jobs:
            for row in self._rows(job):
                wanted.setdefault(row, set()).update(_work(job).points)
        known = {row: self._known(row, points) for row, points in wanted.items() if self._knows(row, points)}
        rows = [row for row in wanted if row not in known]
        if not rows:  # another pass has shown them meanwhile
            for job in jobs:
                self._add_reduction(job, known)
            return
        points = {point for row in rows for point in wanted[row]}
        self._pass = _Pass(jobs, rows, known, self._engine.begin_capture(rows, points))

    def _rows(self, job: Job) -> Sequence[RowSpec]:
        """One per prompt; equal ones show the same."""
        return self._edited.get(job.id) or [only_read(prompt) for prompt in _work(job).prompts]

    def _knows(self, row: RowSpec, points: Collection[Any]) -> bool:
        return not row.edits and all(self._engine.recent.has((row.prompt_ids, point)) for point in points)

    def _known(self, row: RowSpec, points: Collection[Any]) -> Captured:
        found = {point: self._engine.recent.get((row.prompt_ids, point)) for point in points}
        return {point: known for point, known in found.items() if known is not None}

    def _piece(self, most: int, steps: float | None) -> None:
        assert self._pass is not None
        running = self._pass.running
        n_tokens = self._pace.tokens(running.depth, most, steps)
        started = time.perf_counter()
        n_run = running.advance(n_tokens)
        if running.is_done:
            self._reduce(self._pass)
        self._pace.passed(n_run, running.depth, time.perf_counter() - started)

    def _reduce(self, done: _Pass) -> None:
        self._pass = None
        found: Mapping[RowSpec, Captured] = dict(zip(done.rows, done.running.result(), strict=True))
        lengths = [len(row.prompt_ids) for row in done.rows]
        self._metrics.captured(len(done.jobs), sum(lengths), len(lengths) * max(lengths) - sum(lengths))
        for job in done.jobs:
            if not job.has_ended:
                self._add_reduction(job, {**done.known, **found})
        self.shared_lately = len(done.jobs) if len(done.jobs) > 1 else 0
        failure = failure_of(lambda: self._keep(found)) if not _work(done.jobs[0]).reproducible else None
        if failure is not None:  # everybody has what they asked for all the same
            let_go(failure)

    def _keep(self, found: Mapping[RowSpec, Captured]) -> None:
        for row, captured in found.items():
            for point, tensor in captured.items():
                if not (row.edits or point.is_inside_attention):
                    self._engine.recent.put((row.prompt_ids, point), partial(_alone, tensor), tensor.nbytes)

    def _add_reduction(self, job: Job, shared: Mapping[RowSpec, Captured]) -> None:
        """One job's answer, from what was captured for all."""
        own = [shared[row] for row in self._rows(job)]
        self._turns.add(job, _work(job).reduce(own), partial(self._ends.answer, job))


def _alone(tensor: Any) -> Any:
    """It, where nothing else lies in its memory; else a copy, so that what lies beside it may go."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _work(job: Job) -> CaptureWork:
    assert isinstance(job.work, CaptureWork)
    return job.work
