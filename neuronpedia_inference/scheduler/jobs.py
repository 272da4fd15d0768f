"""A request as the worker sees it (Job) and the promise its caller waits on (Ticket). No tensors, no clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any


class Ticket:
    """A result that will come, perhaps with events before it. Any thread or event loop may wait on `future`."""

    def __init__(self, on_event: Callable[[Any], None] | None = None) -> None:
        self.future: Future[Any] = Future()
        self._on_event = on_event
        self._cancel = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set() or self.future.cancelled()

    def cancel(self) -> None:
        """The caller has gone: its rows leave at the next tick."""
        self._cancel.set()

    def emit(self, event: Any) -> None:
        """`on_event` is called on the worker's thread, so it only takes note."""
        if self._on_event is not None and not self.cancelled:
            self._on_event(event)

    def resolve(self, result: Any) -> None:
        """No effect on a ticket that has ended."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """No effect on a ticket that has ended."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def abandon(self) -> None:
        """Close the future of a cancelled ticket, so that nothing waits on it for ever."""
        if self.future.cancel():
            self.future.set_running_or_notify_cancel()  # before it, `concurrent.futures.wait` takes it for pending


Steps = Generator[Future[Any] | None, Any, Any]
"""Work that gives way: yields the future of weights that it needs and is sent what that gives, or yields None where
others may have a turn; returns its own result.

What a future gives has a `release`, which is called for it if the work ends before it could take it.
"""


@dataclass(frozen=True)
class CaptureWork:
    """Read tensors in one forward pass and reduce them to plain values, beside the model."""

    prompts: Sequence[Sequence[int]]
    points: Collection[Any]
    """points.Point"""
    reduce: Callable[[list[Any]], Steps]
    """Gets one mapping of point to tensor per prompt."""
    reproducible: bool = False
    """Whether its numbers must not depend on what else there is to do."""
    prepare: Callable[[], Steps] | None = None
    """-> engine.protocol.RowSpec per prompt, with what edits it; None where nothing does."""

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def reads_attention(self) -> bool:
        """Whether its pass holds patterns. Rows of others, admitted without theirs, must not be in it."""
        return any(point.is_inside_attention for point in self.points)


@dataclass(frozen=True)
class GenerateWork:
    """Generate rows that share a prompt. Events are the engine.protocol.RowStep of some of them; the result is None."""

    prepare: Callable[[], Steps]
    """-> engine.protocol.RowSpec per row"""
    n_rows: int
    n_prompt_tokens: int
    n_positions: int
    """Prompt and completion together, at most."""
    streams: bool = False
    """Whether somebody reads its tokens as they come."""
    reproducible: bool = False
    """Whether its tokens must not depend on what else there is to do."""

    @property
    def n_new(self) -> int:
        """Tokens of a row, at most."""
        return self.n_positions - self.n_prompt_tokens


@dataclass(frozen=True)
class CallWork:
    """Anything else that needs the device."""

    run: Callable[[], Steps]
    is_aside: bool = False
    """Whether it goes on beside everything else, a step at a time, and nobody waits for its end before he begins."""


Work = CaptureWork | GenerateWork | CallWork


@dataclass
class Job:
    """One unit of work in the worker's hands."""

    id: int
    work: Work
    submitted_s: float
    """Monotonic time."""
    deadline_s: float | None
    """Monotonic time after which it is no longer begun; None for never."""
    ticket: Ticket = field(default_factory=Ticket)
    context: Context = field(default_factory=copy_context)
    """Of the caller, so that what is logged about the job carries its request id."""
    came_at: int = 0
    """How many steps had been made when it came."""
    has_ended: bool = False
    """Its caller has been told, one way or another."""
