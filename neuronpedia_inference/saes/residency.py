"""Who is in a bounded memory, who waits for it, and who must leave. Bookkeeping only: no lock, no tensor, no thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from neuronpedia_inference.saes.encode import FeatureReader

PATIENCE = 64
"""Leases that others are given while the first in the queue waits for room; then everybody waits for it."""


class Lease:
    """The right to use one SAE now. Until `release` it stays where it is; afterwards it may lose its weights."""

    def __init__(self, reader: FeatureReader, give_back: Callable[[Lease], None]) -> None:
        self.reader = reader
        self._give_back = give_back

    def release(self) -> None:
        """May be called twice without effect."""
        self._give_back(self)

    def __enter__(self) -> FeatureReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.release()


class FreeLease:
    """In place of a lease where there is nothing to give back."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def release(self) -> None:
        """Nothing was taken."""

    def __enter__(self) -> Any:
        return self.reader

    def __exit__(self, *_: object) -> None: ...


class Waiting:
    """Futures of leases, by the name of what is wanted, oldest first."""

    def __init__(self) -> None:
        self._futures: dict[str, list[Future[Lease]]] = {}

    def __bool__(self) -> bool:
        return bool(self._futures)

    def add(self, name: str, future: Future[Lease]) -> None:
        self._futures.setdefault(name, []).append(future)

    def names(self) -> list[str]:
        """Who has cancelled does not wait any more."""
        alive = {name: [f for f in futures if not f.cancelled()] for name, futures in self._futures.items()}
        self._futures = {name: futures for name, futures in alive.items() if futures}
        return list(self._futures)

    def take(self, names: Iterable[str]) -> list[Future[Lease]]:
        """They wait no longer, and are to be completed."""
        return [future for name in names for future in self._futures.pop(name, [])]


def grant(future: Future[Any], lease: Lease | FreeLease) -> None:
    """The lease is released again where the future was cancelled."""
    try:
        future.set_result(lease)
    except InvalidStateError:
        lease.release()


def refuse(futures: Iterable[Future[Any]], error: Exception) -> None:
    for future in futures:
        with suppress(InvalidStateError):  # cancelled
            future.set_exception(error)


def chained(first: Future[Any], then: Callable[[Any], Future[Any]]) -> Future[Any]:
    """What the future gets that `then` makes of the first one's result, or the error of either."""
    found: Future[Any] = Future()

    def give(done: Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, Exception):
            refuse([found], error)
        else:
            grant(found, done.result())

    def go_on(done: Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, Exception):
            refuse([found], error)
        else:
            then(done.result()).add_done_callback(give)

    first.add_done_callback(go_on)
    return found


def give_back(future: Future[Lease]) -> None:
    """Whatever became of it: nobody may have waited to the end."""
    if not future.cancel() and future.exception() is None:
        future.result().release()


@dataclass
class _Place:
    n_bytes: int
    is_arriving: bool
    leases: set[object] = field(default_factory=set)

    @property
    def is_idle(self) -> bool:
        return not self.leases and not self.is_arriving


class Residency:
    """The least recently used leave first, and nobody who is leased or still arriving.

    Both bounds hold at any time; None is no bound.
    """

    def __init__(self, max_count: int | None, max_bytes: int | None) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._places: OrderedDict[str, _Place] = OrderedDict()
        # Who waits for room, and, since it does, who came in and how many leases were given.
        self._first: str | None = None
        self._guests: set[str] = set()
        self._overtaken = 0

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def n_bytes(self) -> int:
        return sum(place.n_bytes for place in self._places.values())

    @property
    def n_leased(self) -> int:
        """How many are leased, by one or by many."""
        return sum(1 for place in self._places.values() if place.leases)

    @property
    def is_draining(self) -> bool:
        """Whether no lease is to be given before the first in the queue has room: it was overtaken often enough."""
        return self._overtaken >= PATIENCE

    def next_of(self, queue: Sequence[tuple[str, int]]) -> tuple[str, list[str]] | None:
        """Of (name, bytes) that want in, oldest first: who comes in now, and who leaves for it. None: all must wait.

        While the oldest waits for leases to end, a younger one comes in only where both will have room together.
        """
        if not queue:
            self._wait_for(None)
            return None
        (first, needed), *younger = queue
        leaving = [] if first in self else self.leaving_for(needed)
        self._wait_for(first if leaving is None else None)
        if leaving is not None:
            return first, leaving
        for name, n_bytes in younger:
            leaving = self.leaving_for(n_bytes)
            if leaving is not None and name not in self and self._leaves_room(n_bytes, needed):
                return name, leaving
        return None

    def leaving_for(self, n_bytes: int) -> list[str] | None:
        """Who leaves so that another of `n_bytes` has room; None while leases forbid it."""
        idle = iter([name for name, place in self._places.items() if place.is_idle])
        leaving: list[str] = []
        count, total = len(self) + 1, self.n_bytes + n_bytes
        while not self._fits(count, total):
            name = next(idle, None)
            if name is None:
                return None
            leaving.append(name)
            count, total = count - 1, total - self._places[name].n_bytes
        return leaving

    def add(self, name: str, n_bytes: int, *, is_arriving: bool = False) -> None:
        """Room must have been made. is_arriving: it keeps its room until `arrived`, or until it is removed.

        Until those who left have been freed their bytes count as its own: `shrink` says when.
        """
        assert name not in self._places, name
        self._places[name] = _Place(n_bytes, is_arriving)
        assert self._fits(len(self), self.n_bytes), (name, n_bytes, self.n_bytes, self._max_bytes, len(self))
        if self._first is not None:
            self._guests.add(name)

    def is_arriving(self, name: str) -> bool:
        return name in self._places and self._places[name].is_arriving

    def arrived(self, name: str) -> None:
        self._places[name].is_arriving = False

    def shrink(self, name: str, n_bytes: int) -> None:
        """Those whose room it takes have been freed."""
        assert n_bytes <= self._places[name].n_bytes, name
        self._places[name].n_bytes = n_bytes

    def remove(self, name: str) -> None:
        assert not self._places[name].leases, name
        del self._places[name]
        self._guests.discard(name)

    def lease(self, name: str, lease: object) -> None:
        """Hold `name` until the same object releases it."""
        self._places[name].leases.add(lease)
        self._places.move_to_end(name)
        self._overtaken += self._first is not None

    def release(self, name: str, lease: object) -> bool:
        """False if it was released before."""
        place = self._places.get(name)
        if place is None or lease not in place.leases:
            return False
        place.leases.remove(lease)
        return True

    def _wait_for(self, name: str | None) -> None:
        if name != self._first:
            self._first, self._overtaken = name, 0
            self._guests.clear()

    def _leaves_room(self, n_bytes: int, needed: int) -> bool:
        """Whether the first will have what it needs beside this one and the other guests once older leases end."""
        guests = [self._places[guest] for guest in self._guests if not self._places[guest].is_idle]
        return self._fits(len(guests) + 2, sum(guest.n_bytes for guest in guests) + n_bytes + needed)

    def holds(self, sizes: Sequence[int]) -> bool:
        """Whether so many, of these bytes, have room beside each other."""
        return self._fits(len(sizes), sum(sizes))

    def _fits(self, count: int, n_bytes: int) -> bool:
        return (self._max_count is None or count <= self._max_count) and (
            self._max_bytes is None or n_bytes <= self._max_bytes
        )
