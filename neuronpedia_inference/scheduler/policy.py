"""What to do next, decided without clock, lock or tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from neuronpedia_inference.scheduler.jobs import CaptureWork, GenerateWork, Job

FIRST_STEPS = 3
"""A generation that has come in, with its first token, decodes so many steps before it makes way for another."""
OVERTAKEN_STEPS = 64
"""Who asks for so many fewer tokens may come so many steps later, and goes first all the same; nobody comes later."""
PARKED_STEPS = 128
"""So many steps after it was parked others make way for it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one turn. A single job always fits, or it would never run: admission has refused what is too large."""

    max_rows: int = 16
    """Rows that may generate at the same time."""
    max_prefill_tokens: int = 512
    """Tokens, padding included, of prompts that are prefilled together, and of one piece of longer ones."""
    max_capture_tokens: int = 512
    """Tokens, padding included, of captures that share a forward pass, and of one piece of longer ones."""
    max_padding: float = 0.25
    """Share of padding in either."""
    small_pass: int = 64
    """Tokens up to which padding does not matter: such a pass is hardly longer than a shorter one."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One turn of the worker. A job is in one of these at the most; the rest wait on."""

    cancelled: tuple[Job, ...] = ()
    """Their callers have gone."""
    expired: tuple[Job, ...] = ()
    """They waited past their deadline."""
    run: tuple[Job, ...] = ()
    """A call that begins, or captures that share one forward pass."""
    prefill: tuple[Job, ...] = ()
    """Generations whose prompts begin to run; then they decode with those that run."""
    park: tuple[Job, ...] = ()
    """Generations that make way. They go on later where they are now."""
    resume: tuple[Job, ...] = ()
    """Parked ones that go on."""


@dataclass(frozen=True, slots=True)
class Stint:
    """A generation that decodes, or is parked."""

    job: Job
    n_steps: int = 0
    """Since it came in, or was parked."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What has begun and not ended."""

    reading: Sequence[Job] = ()
    """Calls and captures that can go on. One group at a time."""
    joining: Sequence[Job] = ()
    """Generations whose prompts run. One group at a time, and one of small prompts that goes before it."""
    can_be_passed: bool = False
    """Whether such a group may begin: it has gone on since another went before it."""
    decoding: Sequence[Stint] = ()
    parked: Sequence[Stint] = ()
    """Who has waited longest comes first."""
    paused: Sequence[Job] = ()
    """Those who wait for weights or are done aside, and hold up nobody."""


def plan_tick(waiting: Sequence[Job], under_way: UnderWay, limits: Limits, now_s: float) -> Tick:
    """What may begin beside what is under way: calls and captures in order of arrival, generations by when they would
    be done if all ran at once, of which no more than OVERTAKEN_STEPS count.

    `waiting` is in order of arrival. A generation whose rows do not fit beside the running ones has others make way,
    those first that have decoded longest since they came in. Where not even that is enough it waits, and those behind
    it wait too: a small request does not overtake a large one for ever. With nothing running, any fits.
    """
    stints = [stint.job for stint in (*under_way.decoding, *under_way.parked)]
    begun = (*under_way.reading, *under_way.joining, *stints, *under_way.paused)
    cancelled = tuple(job for job in (*waiting, *begun) if job.ticket.cancelled)
    expired = tuple(job for job in waiting if not job.ticket.cancelled and _is_late(job, now_s))
    gone = {job.id for job in (*cancelled, *expired)}
    ready = [job for job in waiting if job.id not in gone]
    reading = () if under_way.reading else _read_together(ready, limits)
    rows = _Rows(under_way, gone, limits)
    rows.resume_due()
    if under_way.can_be_passed:
        ready = [job for job in ready if _prompt_tokens(job) <= limits.small_pass]
        limits = replace(limits, max_prefill_tokens=limits.small_pass)
    prefill = rows.joining(ready, limits) if under_way.can_be_passed or not under_way.joining else ()
    rows.resume_where_there_is_room()
    return Tick(cancelled, expired, reading, prefill, tuple(rows.made_way), tuple(rows.resumed))


class _Rows:
    """Who may decode: a plan in the making."""

    def __init__(self, under_way: UnderWay, gone: Collection[int], limits: Limits) -> None:
        self._limits = limits
        self._decoding = [stint for stint in under_way.decoding if stint.job.id not in gone]
        self._parked = [stint for stint in under_way.parked if stint.job.id not in gone]
        self._n_coming = sum(_generation(job).n_rows for job in under_way.joining)
        """Rows that decode before the next tick, or soon."""
        self._is_blocked = False
        """Somebody waits for room, and nobody overtakes it."""
        self.made_way: list[Job] = []
        self.resumed: list[Job] = []

    def resume_due(self) -> None:
        """The one who has been parked longest, if it is time: others make way for it. One in a tick."""
        stint = next(iter(self._parked), None)
        if stint is not None and stint.n_steps >= PARKED_STEPS:
            self._is_blocked = not self._make_room(_generation(stint.job).n_rows)
            if not self._is_blocked:
                self._resume(stint)

    def resume_where_there_is_room(self) -> None:
        while not self._is_blocked and self._parked and self._fits(_generation(self._parked[0].job).n_rows):
            self._resume(self._parked[0])

    def joining(self, ready: Sequence[Job], limits: Limits) -> tuple[Job, ...]:
        """The first generation, if there is or can be made room for it, and the others that fit with it."""
        group: list[Job] = []
        lengths: list[int] = []
        generations = sorted((job for job in ready if isinstance(job.work, GenerateWork)), key=_due)
        for job in generations if not self._is_blocked else ():
            work = _generation(job)
            longer = lengths + [work.n_prompt_tokens] * work.n_rows
            shares = not any(_generation(one).reproducible for one in (*group, job))
            if group and not (shares and _fits_one_pass(longer, limits.max_prefill_tokens, limits)):
                continue
            if self._make_room(work.n_rows):
                group, lengths = [*group, job], longer
                self._n_coming += work.n_rows
            elif not group:
                self._is_blocked = True
                return ()
        return tuple(group)

    def _resume(self, stint: Stint) -> None:
        self._parked.remove(stint)
        self.resumed.append(stint.job)
        self._n_coming += _generation(stint.job).n_rows

    def _n_running(self) -> int:
        return self._n_coming + sum(_generation(stint.job).n_rows for stint in self._decoding)

    def _fits(self, n_rows: int) -> bool:
        running = self._n_running()
        return running == 0 or running + n_rows <= self._limits.max_rows

    def _make_room(self, n_rows: int) -> bool:
        """Whether so many rows fit, once those who have decoded longest are parked. Who need not is not."""
        before = list(self._decoding)
        makes_way = sorted((one for one in self._decoding if one.n_steps >= FIRST_STEPS), key=lambda one: -one.n_steps)
        parked = []
        while not self._fits(n_rows) and makes_way:
            parked.append(makes_way.pop(0))
            self._decoding.remove(parked[-1])
        if not self._fits(n_rows):
            self._decoding = before
            return False
        self.made_way += [stint.job for stint in parked]
        return True


def _share_a_pass(one: CaptureWork, other: CaptureWork) -> bool:
    return one.reads_attention == other.reads_attention and not (one.reproducible or other.reproducible)


def _generation(job: Job) -> GenerateWork:
    assert isinstance(job.work, GenerateWork)
    return job.work


def _prompt_tokens(job: Job) -> int:
    """Of all rows that it generates."""
    return job.work.n_rows * job.work.n_prompt_tokens if isinstance(job.work, GenerateWork) else 0


def _due(job: Job) -> int:
    """The step at which it would be done if it had not to wait, or at which nobody goes before it any more."""
    return job.came_at + min(_generation(job).n_new, OVERTAKEN_STEPS)


def _read_together(ready: Sequence[Job], limits: Limits) -> tuple[Job, ...]:
    """The oldest call or capture and, for a capture, the later ones that fit into its forward pass."""
    oldest = next((job for job in ready if not isinstance(job.work, GenerateWork)), None)
    if oldest is None or not isinstance(oldest.work, CaptureWork) or oldest.work.reproducible:
        return () if oldest is None else (oldest,)
    group, lengths = [oldest], oldest.work.lengths
    for job in ready:
        work = job.work
        if job is not oldest and isinstance(work, CaptureWork) and _share_a_pass(work, oldest.work):
            longer = lengths + work.lengths
            if _fits_one_pass(longer, limits.max_capture_tokens, limits):
                group, lengths = [*group, job], longer
    return tuple(group)


def _fits_one_pass(lengths: Sequence[int], max_tokens: int, limits: Limits) -> bool:
    padded = len(lengths) * max(lengths)
    is_dense = padded <= limits.small_pass or sum(lengths) >= (1 - limits.max_padding) * padded
    return padded <= max_tokens and is_dense


def _is_late(job: Job, now_s: float) -> bool:
    return job.deadline_s is not None and now_s > job.deadline_s
