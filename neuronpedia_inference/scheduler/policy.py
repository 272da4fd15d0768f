"""What to do next, decided without clock, lock or tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from neuronpedia_inference.scheduler.jobs import CaptureWork, GenerateWork, Job


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one turn. A single job always fits, or it would never run: admission has refused what is too large."""

    max_rows: int = 16
    """Rows that may generate at the same time."""
    max_cache_positions: int = 2**20
    """Rows that generate × positions of the longest of them."""
    max_prefill_tokens: int = 512
    """Tokens, padding included, of prompts that are prefilled together, and of one piece of longer ones."""
    max_capture_tokens: int = 512
    """Tokens, padding included, of captures that share a forward pass, and of one piece of longer ones."""
    max_padding: float = 0.25
    """Share of padding in either."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One turn of the worker. Every waiting job is in at most one of the four; the rest wait on."""

    cancelled: tuple[Job, ...] = ()
    """Their callers have gone."""
    expired: tuple[Job, ...] = ()
    """They waited past their deadline."""
    run: tuple[Job, ...] = ()
    """A call that begins, or captures that share one forward pass."""
    prefill: tuple[Job, ...] = ()
    """Generations whose prompts begin to run; then they decode with those that run."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What has begun and not ended."""

    reading: Sequence[Job] = ()
    """Calls and captures that can go on. One group at a time."""
    joining: Sequence[Job] = ()
    """Generations whose prompts run. One group at a time."""
    decoding: Sequence[Job] = ()
    paused: Sequence[Job] = ()
    """Those who wait for weights, and hold up nobody."""


def plan_tick(waiting: Sequence[Job], under_way: UnderWay, limits: Limits, now_s: float) -> Tick:
    """Oldest first: what may begin beside what is under way.

    `waiting` is in order of arrival. A generation whose rows do not fit beside the running ones waits, and those
    behind it wait too: a small request does not overtake a large one for ever. With nothing running, any fits.
    """
    begun = (*under_way.reading, *under_way.joining, *under_way.decoding, *under_way.paused)
    cancelled = tuple(job for job in (*waiting, *begun) if job.ticket.cancelled)
    expired = tuple(job for job in waiting if not job.ticket.cancelled and _is_late(job, now_s))
    gone = {job.id for job in (*cancelled, *expired)}
    ready = [job for job in waiting if job.id not in gone]
    staying = [job.work for job in under_way.decoding if job.id not in gone and isinstance(job.work, GenerateWork)]
    reading = () if under_way.reading else _read_together(ready, limits)
    joining = () if under_way.joining else _joining(ready, staying, limits)
    return Tick(cancelled, expired, reading, joining)


def _read_together(ready: Sequence[Job], limits: Limits) -> tuple[Job, ...]:
    """The oldest call or capture and, for a capture, the later ones that fit into its forward pass."""
    oldest = next((job for job in ready if not isinstance(job.work, GenerateWork)), None)
    if oldest is None or not isinstance(oldest.work, CaptureWork):
        return () if oldest is None else (oldest,)
    group, lengths = [oldest], oldest.work.lengths
    for job in ready:
        work = job.work
        if job is not oldest and isinstance(work, CaptureWork) and work.reads_attention == oldest.work.reads_attention:
            longer = lengths + work.lengths
            if _fits_one_pass(longer, limits.max_capture_tokens, limits):
                group, lengths = [*group, job], longer
    return tuple(group)


def _joining(ready: Sequence[Job], running: Sequence[GenerateWork], limits: Limits) -> tuple[Job, ...]:
    """The oldest generation, if it fits beside those that run, and the later ones that fit with it."""
    group: list[Job] = []
    rows = list(running)
    lengths: list[int] = []
    for job in ready:
        work = job.work
        if not isinstance(work, GenerateWork):
            continue
        longer = lengths + [work.n_prompt_tokens] * work.n_rows
        fits = not rows or _fits_the_batch([*rows, work], limits)
        if not group and not fits:
            return ()
        if not group or (fits and _fits_one_pass(longer, limits.max_prefill_tokens, limits)):
            group, rows, lengths = [*group, job], [*rows, work], longer
    return tuple(group)


def _fits_the_batch(works: Iterable[GenerateWork], limits: Limits) -> bool:
    works = list(works)
    n_rows = sum(work.n_rows for work in works)
    longest = max(work.n_positions for work in works)
    return n_rows <= limits.max_rows and n_rows * longest <= limits.max_cache_positions


def _fits_one_pass(lengths: Sequence[int], max_tokens: int, limits: Limits) -> bool:
    padded = len(lengths) * max(lengths)
    return padded <= max_tokens and sum(lengths) >= (1 - limits.max_padding) * padded


def _is_late(job: Job, now_s: float) -> bool:
    return job.deadline_s is not None and now_s > job.deadline_s
