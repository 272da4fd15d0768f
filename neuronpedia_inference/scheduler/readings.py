"""Captures and calls: forward passes that are only read, and what is made of them.

What a pass has shown of a prompt is kept for a while. Who asks for it again, for another feature or another SAE of the
same place, gets it without a pass.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from neuronpedia_inference.engine.faults import failure_of, let_go
from neuronpedia_inference.engine.protocol import Captured, Capturing, Engine
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.scheduler.ends import Ends
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, Job, Steps
from neuronpedia_inference.scheduler.pace import Pace
from neuronpedia_inference.scheduler.turns import Turns

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class _Pass:
    """One forward pass for several jobs, the same prompt once."""

    jobs: Sequence[Job]
    prompts: Sequence[Prompt]
    """Those that run."""
    known: Mapping[Prompt, Captured]
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

    def begin_known(self, job: Job) -> bool:
        """Whether it is a capture of which all is known: it needs no pass, and its reduction begins."""
        work = job.work
        if not isinstance(work, CaptureWork) or work.reproducible:
            return False
        prompts = {tuple(prompt): work.points for prompt in work.prompts}
        if not all(self._knows(prompt, points) for prompt, points in prompts.items()):
            return False
        self._add_reduction(job, {prompt: self._known(prompt, points) for prompt, points in prompts.items()})
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
        groups = ([one for one in group if one is not job] for group in self._groups)
        self._groups = deque(group for group in groups if group)
        if self._pass is not None and all(one.has_ended for one in self._pass.jobs):
            self._pass = None

    def _start(self, jobs: Sequence[Job]) -> None:
        if _work(jobs[0]).reproducible:
            work = _work(jobs[0])
            prompts = list(dict.fromkeys(map(tuple, work.prompts)))
            running = self._engine.begin_capture(prompts, set(work.points), reproducible=True)
            self._pass = _Pass(jobs, prompts, {}, running)
            return
        wanted: dict[Prompt, set[Any]] = {}
        for job in jobs:
            for prompt in _work(job).prompts:
                wanted.setdefault(tuple(prompt), set()).update(_work(job).points)
        known = {
            prompt: self._known(prompt, points) for prompt, points in wanted.items() if self._knows(prompt, points)
        }
        prompts = [prompt for prompt in wanted if prompt not in known]
        if not prompts:  # another pass has shown them meanwhile
            for job in jobs:
                self._add_reduction(job, known)
            return
        points = {point for prompt in prompts for point in wanted[prompt]}
        self._pass = _Pass(jobs, prompts, known, self._engine.begin_capture(prompts, points))

    def _knows(self, prompt: Prompt, points: Collection[Any]) -> bool:
        return all(self._engine.recent.has((prompt, point)) for point in points)

    def _known(self, prompt: Prompt, points: Collection[Any]) -> Captured:
        return {point: known for point in points if (known := self._engine.recent.get((prompt, point))) is not None}

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
        found: Mapping[Prompt, Captured] = dict(zip(done.prompts, done.running.result(), strict=True))
        lengths = [len(prompt) for prompt in done.prompts]
        self._metrics.captured(len(done.jobs), sum(lengths), len(lengths) * max(lengths) - sum(lengths))
        for job in done.jobs:
            if not job.has_ended:
                self._add_reduction(job, {**done.known, **found})
        self.shared_lately = len(done.jobs) if len(done.jobs) > 1 else 0
        failure = failure_of(lambda: self._keep(found)) if not _work(done.jobs[0]).reproducible else None
        if failure is not None:  # everybody has what they asked for all the same
            let_go(failure)

    def _keep(self, found: Mapping[Prompt, Captured]) -> None:
        for prompt, captured in found.items():
            for point, tensor in captured.items():
                if not point.is_inside_attention:
                    self._engine.recent.put((prompt, point), tensor.clone, tensor.nbytes)

    def _add_reduction(self, job: Job, shared: Mapping[Prompt, Captured]) -> None:
        self._turns.add(job, _reduction(_work(job), shared), partial(self._ends.answer, job))


def _work(job: Job) -> CaptureWork:
    assert isinstance(job.work, CaptureWork)
    return job.work


def _reduction(work: CaptureWork, shared: Mapping[Prompt, Captured]) -> Steps:
    """One job's answer from what was captured for all."""
    return work.reduce([shared[tuple(prompt)] for prompt in work.prompts])
