"""What to do next, decided without clock, lock or tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuronpedia_inference.scheduler.jobs import CaptureWork, Job


@dataclass(frozen=True, slots=True)
class Limits:
    max_rows: int = 16
    """Rows that may generate at the same time."""
    max_capture_tokens: int = 1024
    """Tokens, padding included, of captures that share a forward pass."""
    max_padding: float = 0.25
    """Share of padding in such a pass."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One turn of the worker. Every waiting job is in at most one of the first four; the rest wait on."""

    cancelled: tuple[Job, ...] = ()
    """Their callers have gone."""
    expired: tuple[Job, ...] = ()
    """They waited past their deadline."""
    run: tuple[Job, ...] = ()
    """A call, or captures that share one forward pass; done within this tick."""
    prefill: Job | None = None
    """A generation that begins."""
    decode: tuple[Job, ...] = ()
    """Running generations that take one step."""


def plan_tick(waiting: Sequence[Job], running: Sequence[Job], limits: Limits, now_s: float) -> Tick:
    """Oldest first; between two decode steps at most one pass of captures and one prefill, so that no stream starves.

    `waiting` is in order of arrival. A generation whose rows do not fit beside the running ones waits, and those
    behind it wait too: a small request does not overtake a large one for ever. With nothing running, any fits.
    """
    cancelled = tuple(job for job in (*waiting, *running) if job.ticket.cancelled)
    expired = tuple(job for job in waiting if not job.ticket.cancelled and _is_late(job, now_s))
    gone = {job.id for job in (*cancelled, *expired)}
    ready = [job for job in waiting if job.id not in gone]
    decode = tuple(job for job in running if job.id not in gone)
    next_prefill = next((job for job in ready if job.generates), None)
    if next_prefill is not None and decode:
        rows = sum(job.n_rows for job in decode) + next_prefill.n_rows
        next_prefill = next_prefill if rows <= limits.max_rows else None
    next_run = _together([job for job in ready if not job.generates], limits)
    return Tick(cancelled, expired, next_run, next_prefill, decode)


def _together(ready: Sequence[Job], limits: Limits) -> tuple[Job, ...]:
    """The oldest job and, if it is a capture, the later ones that fit into its forward pass."""
    if not ready:
        return ()
    oldest = ready[0]
    if not isinstance(oldest.work, CaptureWork):
        return (oldest,)
    group, lengths = [oldest], oldest.work.lengths
    for job in ready[1:]:
        if isinstance(job.work, CaptureWork) and job.work.is_residual == oldest.work.is_residual:
            longer = lengths + job.work.lengths
            padded = len(longer) * max(longer)
            if padded <= limits.max_capture_tokens and sum(longer) >= (1 - limits.max_padding) * padded:
                group, lengths = [*group, job], longer
    return tuple(group)


def _is_late(job: Job, now_s: float) -> bool:
    return job.deadline_s is not None and now_s > job.deadline_s
