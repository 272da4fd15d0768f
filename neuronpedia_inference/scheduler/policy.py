"""What to do next, decided without clock, lock or tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuronpedia_inference.scheduler.jobs import Job


@dataclass(frozen=True, slots=True)
class Limits:
    max_rows: int
    """Rows that may generate at the same time."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One turn of the worker. Every waiting job is in at most one of the first four; the rest wait on."""

    cancelled: tuple[Job, ...] = ()
    """Their callers have gone."""
    expired: tuple[Job, ...] = ()
    """They waited past their deadline."""
    run: Job | None = None
    """A capture or call, done within this tick."""
    prefill: Job | None = None
    """A generation that begins."""
    decode: tuple[Job, ...] = ()
    """Running generations that take one step."""


def plan_tick(waiting: Sequence[Job], running: Sequence[Job], limits: Limits, now_s: float) -> Tick:
    """Oldest first; between two decode steps at most one capture and one prefill, so that no stream starves.

    `waiting` is in order of arrival. A generation whose rows do not fit beside the running ones waits, and those
    behind it wait too: a small request does not overtake a large one for ever. With nothing running, any fits.
    """
    cancelled = tuple(job for job in (*waiting, *running) if job.ticket.cancelled)
    expired = tuple(job for job in waiting if not job.ticket.cancelled and _is_late(job, now_s))
    gone = {job.id for job in (*cancelled, *expired)}
    ready = [job for job in waiting if job.id not in gone]
    decode = tuple(job for job in running if job.id not in gone)
    next_run = next((job for job in ready if not job.generates), None)
    next_prefill = next((job for job in ready if job.generates), None)
    if next_prefill is not None and decode:
        rows = sum(job.n_rows for job in decode) + next_prefill.n_rows
        next_prefill = next_prefill if rows <= limits.max_rows else None
    return Tick(cancelled, expired, next_run, next_prefill, decode)


def _is_late(job: Job, now_s: float) -> bool:
    return job.deadline_s is not None and now_s > job.deadline_s
