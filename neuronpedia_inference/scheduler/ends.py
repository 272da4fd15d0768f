"""How jobs end: each once, counted, its caller told, and whoever had to do with it forgetting it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from neuronpedia_inference.engine.faults import as_inference_error, failure_of, free_caches, poisons_device
from neuronpedia_inference.errors import OutOfMemory, let_go
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.scheduler.jobs import Job

log = logging.getLogger(__name__)


class Ends:
    """What goes wrong with a job ends this job and no other."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.forget: Sequence[Callable[[Job], None]] = ()
        """Called with every job that has ended."""
        self.device_failed = False

    def attempt(self, job: Job, work: Callable[[], object]) -> None:
        failure = failure_of(work)
        if failure is not None:
            self.fail(job, failure)

    def fail(self, job: Job, failure: Exception) -> None:
        error = as_inference_error(failure)
        if error is not failure:
            job.context.run(log.error, "job failed", exc_info=failure)
        self.end(job, "failed", partial(job.ticket.fail, error))
        self.give_up(failure)

    def give_up(self, failure: Exception) -> bool:
        """What has failed is let go, so that its memory is there for others. Whether the device can be used on."""
        self.device_failed = self.device_failed or poisons_device(failure)
        let_go(failure)
        if isinstance(as_inference_error(failure), OutOfMemory):
            free_caches()
        return not self.device_failed

    def alone(self, jobs: Sequence[Job], failure: Exception) -> list[Job]:
        """A merged pass that failed says nothing about whose fault it is: those who have to run it again, each alone.

        One who was alone already answers for it.
        """
        inside = [job for job in jobs if not job.has_ended]
        if len(inside) > 1:
            log.warning("a merged forward pass failed, its requests run one by one", exc_info=failure)
            if self.give_up(failure):
                return inside
        for job in inside:
            self.fail(job, failure)
        return []

    def answer(self, job: Job, result: Any = None) -> None:
        self.end(job, "answered", partial(job.ticket.resolve, result))

    def cancel(self, job: Job) -> None:
        self.end(job, "cancelled", job.ticket.abandon)

    def end(self, job: Job, outcome: str, tell: Callable[[], None]) -> None:
        """No effect on a job that has ended. outcome: one of metrics.JOB_OUTCOMES."""
        if job.has_ended:
            return
        job.has_ended = True
        self._metrics.ended(outcome)
        tell()
        for forget in self.forget:
            forget(job)
