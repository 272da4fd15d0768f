"""How long a request keeps what it was admitted with: until its answer has gone, however slowly that is taken."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Protocol, Self


class Held(Protocol):
    """What was admitted."""

    def release(self) -> None:
        """May be called again without effect."""
        ...


class Stay:
    """One request. Inside `with stay`, what is admitted is held until `close`; a `with` that fails closes it."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._works: list[tuple[Future[Any], Held]] = []
        self._before: Token[Stay | None] | None = None

    def __enter__(self) -> Self:
        self._before = _STAY.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        assert self._before is not None
        _STAY.reset(self._before)
        if exc is not None:
            self.close()

    def close(self) -> None:
        """May be called again without effect. What is admitted later is held until it is closed again."""
        self._works.clear()
        self._held.close()

    def hold(self, work: Future[Any], permit: Held) -> None:
        """To the end of the stay, and of the work: rows of a caller who has left are inside a little longer."""
        self._works.append((work, permit))
        self._held.callback(lambda: work.add_done_callback(lambda _: permit.release()))

    def idle(self) -> list[Held]:
        """What is held for work that has ended."""
        return [permit for work, permit in self._works if work.done()]


def hold(work: Future[Any], permit: Held) -> None:
    """Release the permit at the end of the stay that we are in, if any, and of the work."""
    stay = _STAY.get()
    if stay is None:
        work.add_done_callback(lambda _: permit.release())
    else:
        stay.hold(work, permit)


def idle() -> list[Any]:
    """What the stay that we are in holds for work that has ended."""
    stay = _STAY.get()
    return [] if stay is None else stay.idle()


_STAY: ContextVar[Stay | None] = ContextVar("stay", default=None)
