"""Which SAEs are in memory: masters on the host, copies on the device, each least recently used first out.

None leaves the device while it is being used. A start reads headers and configurations. One feature is read from its
file; a whole SAE comes when all its features are asked for, brought by a thread of its own, so that nobody waits for an
SAE that it does not need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import (
    EngineFailed,
    InferenceError,
    LimitExceeded,
    NotReady,
    StartupError,
    UnknownSource,
)
from neuronpedia_inference.exits import start_beside
from neuronpedia_inference.saes import describe as described
from neuronpedia_inference.saes.convert import convert
from neuronpedia_inference.saes.describe import Described
from neuronpedia_inference.saes.encode import FeatureReader
from neuronpedia_inference.saes.load import Load, load_sae, place_on_device
from neuronpedia_inference.saes.masters import Masters
from neuronpedia_inference.saes.residency import FreeLease, Lease, Residency, Waiting, chained, give_back, grant, refuse
from neuronpedia_inference.saes.slices import Slices
from neuronpedia_inference.saes.specs import SourceSpec
from neuronpedia_inference.saes.stored import Version


class Place(Protocol):
    def __call__(self, master: FeatureReader, device: str, /) -> FeatureReader: ...


class Describe(Protocol):
    def __call__(self, spec: SourceSpec, dtype: str, /) -> Described: ...


class SaeStore:
    """SAEs on a device, at most `budget_bytes` of them; masters on the host, at most `max_loaded` and `host_bytes`.

    Where the device is "cpu" the masters are what is used, within all three bounds. Without a budget `max_loaded`
    bounds the device too. Safe to use from several threads; who holds a lease must not wait for another.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        *,
        dtype: str,
        device: str,
        max_loaded: int,
        host_bytes: int | None = None,
        budget_bytes: int | None = None,
        describe: Describe = described.describe,
        load: Load = load_sae,
        place: Place = place_on_device,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._dtype = dtype
        self._device = device
        self._describe, self._load, self._place = describe, load, place
        self._max_loaded = max_loaded
        self._described: dict[str, Described] = {}
        self._masters: Masters | None = None
        if device == "cpu":
            budget_bytes = min((bound for bound in (host_bytes, budget_bytes) if bound is not None), default=None)
        else:
            self._masters = Masters(load, pinned=device.startswith("cuda"), max_count=max_loaded, max_bytes=host_bytes)
        self._host_bytes = host_bytes
        self._budget = budget_bytes
        self._residency = Residency(max_loaded if device == "cpu" or budget_bytes is None else None, budget_bytes)
        self._readers: dict[str, FeatureReader] = {}
        self._slices = Slices()
        self._waiting = Waiting()
        self._conversions: dict[str, Future[None]] = {}
        self._is_closed = False
        self._peak_bytes = 0
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def describe(self, spec: SourceSpec) -> Described:
        """What an SAE is that is not served yet. Raises StartupError."""
        return self._describe(spec, self._dtype)

    def add(self, spec: SourceSpec, about: Described) -> None:
        """Serve another SAE from now on."""
        with self._lock:  # others may be going through them
            self._specs = {**self._specs, spec.name: spec}
            self._described = {**self._described, spec.name: about}

    def describe_all(
        self, progress: Callable[[str], None] = lambda line: None, but: Collection[str] = frozenset()
    ) -> None:
        """Read what each SAE is, to check it and learn its `Source`. Raises StartupError at a bad one.

        but: names of those that are not here.
        """
        for number, (name, spec) in enumerate(self._specs.items(), start=1):
            if name not in self._described and name not in but:
                progress(f"SAE {number} of {len(self._specs)}: {name}")
                self._described[name] = self._describe(spec, self._dtype)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Sources that have been described, in the order of the specs."""
        described = self._described
        return tuple(described[name].source for name in self._specs if name in described)

    @property
    def readers(self) -> tuple[FeatureReader, ...]:
        """Those of the SAEs that are whole on the device now. Nobody may use them meanwhile but the caller."""
        with self._lock:
            return tuple(self._readers.values())

    @property
    def n_bytes(self) -> int:
        """What all of them take on the device, within the budget."""
        every = sum(about.n_bytes for about in self._described.values())
        return every if self._budget is None else min(every, self._budget)

    @property
    def most_bytes(self) -> int:
        """What SAEs may take on the device, whichever are added."""
        return self.n_bytes if self._budget is None else self._budget

    def find(self, name: str) -> Source | None:
        """A source that has been described."""
        about = self._described.get(name)
        return None if about is None else about.source

    def source(self, name: str) -> Source:
        """Raises UnknownSource with the nearest names."""
        return self._about(name).source

    def files(self, name: str) -> dict[Path, Version]:
        """Of a source, as they were when it was described. Raises as `source` does."""
        return self._about(name).files

    def request(self, name: str) -> Future[Lease]:
        """The right to use all of a source: at once if it is on the device, else when it has been brought there. Never
        waits.

        Raises UnknownSource. The future may get EngineFailed, OutOfMemory, NotReady, or LimitExceeded for one that fits
        in no budget; its callbacks run on a thread of the store. When `cancel` says True no lease is left; when False,
        the future is done.
        """
        about = self._about(name)
        future: Future[Lease] = Future()
        with self._lock:
            if (error := self._refusal(about)) is not None:
                future.set_exception(error)
            elif name in self._readers and not self._residency.is_draining:
                self._counts["hits"] += 1
                future.set_result(self._lease(name))
            else:
                self._waiting.add(name, future)
        self._let_in()
        if not future.done():
            future.add_done_callback(self._notice_cancel)
        return future

    def feature(self, name: str, index: int) -> Future[FreeLease]:
        """One feature of a source: a FeatureWeights, not to be written to. Never waits; fails as `request` does."""
        about = self._about(name)
        if about.is_original and not self._is_closed:
            return chained(self._converted(name), lambda _: self.feature(name, index))
        if about.layout is None or self._is_closed:
            return _taken(self.request(name), lambda reader: reader.feature(index))
        return self._slices.request((name, index, "feature"), about.feature)

    def decoder_row(self, name: str, index: int) -> Future[FreeLease]:
        """One decoder row of a source, [decoder width] in float32, not to be written to. Never waits; fails as
        `request` does, and with InvalidRequest where rows mean nothing."""
        about = self._about(name)
        if about.is_original and not self._is_closed:
            return chained(self._converted(name), lambda _: self.decoder_row(name, index))
        if about.layout is None or self._is_closed:
            return _taken(self.request(name), lambda reader: reader.decoder_row(index))
        return self._slices.request((name, index, "row"), about.decoder_row)

    @contextmanager
    def lease(self, name: str) -> Iterator[FeatureReader]:
        """The reader of a source, kept on the device until the block ends. Waits, and raises as `request` does."""
        future = self.request(name)
        with ExitStack() as at_end:
            at_end.callback(give_back, future)
            yield future.result().reader

    def fill(self) -> None:
        """Bring in as many SAEs as have room together, the first before others. Waits, and raises as `request` does."""
        left_bytes, left = self.n_bytes, self._max_loaded
        for name, about in self._described.items():
            if left and about.n_bytes <= left_bytes and self._refusal(about) is None:
                left_bytes, left = left_bytes - about.n_bytes, left - 1
                self.request(name).result().release()

    def has_room_for(self, names: Sequence[str]) -> bool:
        """Whether these sources, each named once, may be whole on the device at the same time."""
        return self._residency.holds([self._described[name].n_bytes for name in names])

    def stats(self) -> dict[str, int]:
        with self._lock:
            masters = self._masters
            return {
                "sources": len(self._described),
                "max_loaded": self._max_loaded,
                "budget_bytes": self._budget or 0,
                "resident": len(self._readers),
                "resident_bytes": self._residency.n_bytes,
                "peak_bytes": self._peak_bytes,
                "host": len(masters if masters is not None else self._readers),
                "host_budget_bytes": self._host_bytes or 0,
                "host_peak_bytes": masters.peak_bytes if masters is not None else self._peak_bytes,
                "leased": self._residency.n_leased,
                "hits": self._counts["hits"],
                "loads": masters.n_loads if masters is not None else self._counts["loads"],
                "uploads": self._counts["uploads"],
                "evictions": self._counts["evictions"],
                "features_read": self._slices.n_read,
            }

    def close(self) -> None:
        """Those who wait get NotReady, as do all who ask later. Leases stay good."""
        with self._lock:
            self._is_closed = True
            futures = self._waiting.take(self._waiting.names())
        self._slices.close()
        refuse(futures, _closed())

    # Asking

    def _about(self, name: str) -> Described:
        if name not in self._described:
            raise UnknownSource.named("source", name, self._described)
        return self._described[name]

    def _refusal(self, about: Described) -> InferenceError | None:
        """Why a source cannot come at all."""
        if self._is_closed:
            return _closed()
        for bound, setting in ((self._budget, "SAE_MEMORY_GIB"), (self._host_bytes, "SAE_HOST_GIB")):
            if bound is not None and about.n_bytes > bound:
                size, room = about.n_bytes / 2**30, bound / 2**30
                return LimitExceeded(
                    f"All features of {about.source.name!r} take {size:.4g} GiB together, but {setting} leaves "
                    f"{room:.4g} GiB. Ask for features one by one, or raise {setting}."
                )
        return None

    def _lease(self, name: str) -> Lease:
        """The lock is held."""
        lease = Lease(self._readers[name], lambda lease: self._release(name, lease))
        self._residency.lease(name, lease)
        return lease

    def _release(self, name: str, lease: Lease) -> None:
        with self._lock:
            is_new = self._residency.release(name, lease)
        if is_new:
            self._let_in()

    def _notice_cancel(self, future: Future[Lease]) -> None:
        if future.cancelled():
            self._let_in()

    # Coming in

    def _let_in(self) -> None:
        """Whoever has room now: one that is here gets its leases, another a thread that brings it."""
        while True:
            with self._lock:
                chosen = self._residency.next_of(self._queue())
                if chosen is None:
                    return
                name, leaving = chosen
                left_bytes = self._residency.n_bytes
                gone = self._evict(leaving)
                left_bytes -= self._residency.n_bytes
                if name in self._readers:
                    leases = [(future, self._lease(name)) for future in self._waiting.take([name])]
                else:
                    leases = []
                    n_bytes = max(left_bytes, self._described[name].n_bytes)
                    self._residency.add(name, n_bytes, is_arriving=True)
                    self._peak_bytes = max(self._peak_bytes, self._residency.n_bytes)
                    start_beside(f"sae-{name}", self._bring, name, gone)
            for future, lease in leases:
                grant(future, lease)

    def _queue(self) -> list[tuple[str, int]]:
        """The lock is held. Names and bytes of those who wait and are not arriving, oldest first."""
        waiting = [name for name in self._waiting.names() if not self._residency.is_arriving(name)]
        return [(name, self._described[name].n_bytes) for name in waiting]

    def _evict(self, names: Sequence[str]) -> list[FeatureReader]:
        """The lock is held. What is returned is to be freed without it."""
        for name in names:
            self._residency.remove(name)
        self._counts["evictions"] += len(names)
        return [self._readers.pop(name) for name in names]

    # Converting, each by a thread of its own

    def _converted(self, name: str) -> Future[None]:
        """Done once it has another form, in which it is described anew. It may get EngineFailed."""
        with self._lock:
            if name in self._conversions:
                return self._conversions[name]
            future = self._conversions[name] = Future()
        start_beside(f"sae-{name}", self._convert, name, future)
        return future

    def _convert(self, name: str, future: Future[None]) -> None:
        with ExitStack() as on_death:
            on_death.callback(refuse, [future], _failed(name))
            try:
                convert(self._specs[name])
                self.add(self._specs[name], self.describe(self._specs[name]))
            except StartupError as exc:
                with self._lock:  # who asks again tries again
                    del self._conversions[name]
                refuse([future], _failed(name, exc))
            on_death.pop_all()
        if not future.done():
            future.set_result(None)

    # The thread that brings an SAE

    def _bring(self, name: str, gone: Sequence[FeatureReader]) -> None:
        """Into the room that was made, and a lease for each who asked; or an error for each."""
        with ExitStack() as on_death:
            on_death.callback(self._refuse, name, _failed(name))
            self._free(name, gone)
            try:
                if self._described[name].is_original:
                    self._converted(name).result()
                reader = self._read(self._specs[name], self._described[name])
            except (StartupError, InferenceError) as exc:
                on_death.pop_all()
                self._refuse(name, exc)
                return
            on_death.pop_all()
        self._hand_out(name, reader)

    def _free(self, name: str, gone: Sequence[FeatureReader]) -> None:
        for reader in gone:
            reader.free()
        with self._lock:
            self._residency.shrink(name, self._described[name].n_bytes)
        self._let_in()

    def _read(self, spec: SourceSpec, about: Described) -> FeatureReader:
        """The SAE where it is used."""
        if self._masters is None:
            reader = self._load(spec, dtype=about.dtype, device="cpu")
        else:
            with self._masters.fetched(spec, about) as master:
                reader = self._place(master, self._device)
        with self._lock:
            self._counts["loads" if self._masters is None else "uploads"] += 1
        if (reader.source, reader.n_bytes) != (about.source, about.n_bytes):
            reader.free()
            raise StartupError(f"SAE {spec.name!r} ({spec.address}) has changed since the start.")
        return reader

    def _refuse(self, name: str, exc: StartupError | InferenceError) -> None:
        error = exc if isinstance(exc, InferenceError) else _failed(name, exc)
        with self._lock:
            self._residency.remove(name)
            futures = self._waiting.take([name])
        refuse(futures, error)
        self._let_in()

    def _hand_out(self, name: str, reader: FeatureReader) -> None:
        with self._lock:
            self._readers[name] = reader
            self._residency.arrived(name)
            leases = [(future, self._lease(name)) for future in self._waiting.take([name])]
        for future, lease in leases:
            grant(future, lease)
        self._let_in()


def _taken(whole: Future[Lease], part: Callable[[FeatureReader], Any]) -> Future[FreeLease]:
    """A copy of a part of a whole SAE, once that is there."""
    found: Future[FreeLease] = Future()

    def take(done: Future[Lease]) -> None:
        error = NotReady("Nobody waits for it any more.") if done.cancelled() else done.exception()
        if isinstance(error, Exception):
            refuse([found], error)
            return
        try:
            with done.result() as reader:
                grant(found, FreeLease(part(reader)))
        except InferenceError as exc:
            refuse([found], exc)

    whole.add_done_callback(take)
    found.add_done_callback(lambda asked: asked.cancelled() and whole.cancel())
    return found


def _failed(name: str, why: Exception | None = None) -> EngineFailed:
    error = EngineFailed(f"Source {name!r} could not be loaded; the server's log says why.")
    error.__cause__ = why
    return error


def _closed() -> NotReady:
    return NotReady("The server is stopping: its SAEs are not served any more.")
