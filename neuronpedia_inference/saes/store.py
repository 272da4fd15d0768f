"""Which SAEs are in memory: masters on the host, copies on the device, each least recently used first out.

None leaves the device while it is being used. A thread of the store's own brings in what is missing, so that nobody
else waits for a disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from threading import Condition, Thread
from typing import Protocol

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import EngineFailed, InferenceError, NotReady, StartupError, UnknownSource
from neuronpedia_inference.saes.encode import FeatureReader
from neuronpedia_inference.saes.load import Load, Masters, load_sae, place_on_device, stored_bytes
from neuronpedia_inference.saes.residency import Lease, Residency, Waiting, give_back, grant, refuse
from neuronpedia_inference.saes.specs import SourceSpec


class Place(Protocol):
    def __call__(self, master: FeatureReader, device: str, /) -> FeatureReader: ...


class SaeStore:
    """SAEs on a device, at most `budget_bytes` of them, and at most `max_loaded` masters on the host.

    Where the device is "cpu" the masters are what is used, within both bounds. Without a budget `max_loaded` bounds
    the device too. Safe to use from several threads; who holds a lease must not wait for another.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        *,
        dtype: str,
        device: str,
        max_loaded: int,
        budget_bytes: int | None = None,
        load: Load = load_sae,
        place: Place = place_on_device,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._dtype = dtype
        self._device = device
        self._on_host = device == "cpu"
        self._max_loaded = max_loaded
        self._budget = budget_bytes
        self._place = place
        self._sources: dict[str, Source] = {}
        self._sizes: dict[str, int] = {}
        self._masters = Masters(
            load, dtype=dtype, pinned=device.startswith("cuda"), most=0 if self._on_host else max_loaded
        )
        self._residency = Residency(max_loaded if self._on_host or budget_bytes is None else None, budget_bytes)
        self._readers: dict[str, FeatureReader] = {}
        self._waiting = Waiting()
        self._loader: Thread | None = None
        self._arriving: str | None = None
        self._is_closed = False
        self._peak_bytes = 0
        self._counts: Counter[str] = Counter()
        self._changed = Condition()

    def load_all(self, progress: Callable[[str], None] = lambda line: None) -> None:
        """Load every SAE once, to check it and learn its `Source`. Raises StartupError at a bad one."""
        for number, (name, spec) in enumerate(self._specs.items(), start=1):
            if name in self._sources:
                continue
            progress(f"SAE {number} of {len(self._specs)}: {name}")
            # Room is made by what the file's header says. Where there is none, as in SAELens's directory, the size is
            # known only once the SAE is on the host: it is measured there before it counts, and others leave then.
            self._sizes[name] = stored_bytes(spec, self._dtype)
            self._check_size(name)
            try:
                self._ask(name).result().release()
            except InferenceError as exc:
                raise StartupError(f"SAE {name!r} could not be loaded: {exc.message}") from exc

    @property
    def sources(self) -> tuple[Source, ...]:
        """Sources that have been loaded once, in the order of the specs."""
        return tuple(self._sources[name] for name in self._specs if name in self._sources)

    def source(self, name: str) -> Source:
        """Raises UnknownSource with the nearest names."""
        if name not in self._sources:
            raise UnknownSource.named("source", name, self._sources)
        return self._sources[name]

    def request(self, name: str) -> Future[Lease]:
        """The right to use a source: at once if it is on the device, else when it has been brought there. Never waits.

        Raises UnknownSource. The future may get EngineFailed, OutOfMemory or NotReady; its callbacks run on the
        loader's thread. When `cancel` says True no lease is left; when False, the future is done.
        """
        self.source(name)
        return self._ask(name)

    @contextmanager
    def lease(self, name: str) -> Iterator[FeatureReader]:
        """The reader of a source, kept on the device until the block ends. Waits, and raises as `request` does."""
        future = self.request(name)
        with ExitStack() as at_end:
            at_end.callback(give_back, future)
            yield future.result().reader

    def stats(self) -> dict[str, int]:
        with self._changed:
            return {
                "sources": len(self._specs),
                "max_loaded": self._max_loaded,
                "budget_bytes": self._budget or 0,
                "resident": len(self._residency),
                "resident_bytes": self._residency.n_bytes,
                "peak_bytes": self._peak_bytes,
                "host": len(self._residency if self._on_host else self._masters),
                "leased": self._residency.n_leased,
                "hits": self._counts["hits"],
                "loads": self._masters.n_loads,
                "uploads": self._counts["uploads"],
                "evictions": self._counts["evictions"],
            }

    def close(self) -> None:
        """Those who wait get NotReady, as do all who ask later. Leases stay good."""
        with self._changed:
            self._is_closed = True
            futures = self._waiting.take(self._waiting.names())
            self._changed.notify_all()
        refuse(futures, _closed())

    # Asking

    def _ask(self, name: str) -> Future[Lease]:
        future: Future[Lease] = Future()
        with self._changed:
            if self._is_closed:
                future.set_exception(_closed())
            elif name in self._readers and not self._residency.is_draining:
                self._counts["hits"] += 1
                future.set_result(self._lease(name))
            else:
                self._start_loader()
                self._waiting.add(name, future)
                self._changed.notify_all()
        if not future.done():
            future.add_done_callback(self._notice_cancel)
        return future

    def _lease(self, name: str) -> Lease:
        """The lock is held."""
        lease = Lease(self._readers[name], lambda lease: self._release(name, lease))
        self._residency.lease(name, lease)
        return lease

    def _release(self, name: str, lease: Lease) -> None:
        with self._changed:
            if self._residency.release(name, lease):
                self._changed.notify_all()

    def _notice_cancel(self, future: Future[Lease]) -> None:
        if future.cancelled():
            with self._changed:
                self._changed.notify_all()

    def _start_loader(self) -> None:
        """The lock is held. The thread ends when nobody waits: a store that is forgotten leaves none behind."""
        if self._loader is None:
            self._loader = Thread(target=self._run, name="sae-loader", daemon=True)
            self._loader.start()

    # The loader's thread, the only one that changes who is resident

    def _run(self) -> None:
        with ExitStack() as on_death:
            on_death.callback(self._bury)
            while (name := self._next()) is not None:
                self._bring(name)
                self._arriving = None
            on_death.pop_all()

    def _bury(self) -> None:
        """After an error nobody foresaw: those who wait for what was arriving must not wait for ever."""
        with self._changed:
            futures = self._waiting.take([self._arriving] if self._arriving else self._waiting.names())
            self._arriving = self._loader = None
            if self._waiting:
                self._start_loader()
        refuse(futures, EngineFailed("The source could not be loaded; the server's log says why."))

    def _next(self) -> str | None:
        """Who is to be brought in now; its room is made. None, and no loader any more, when nobody waits."""
        with self._changed:
            while (chosen := self._residency.next_of(self._queue())) is None and self._waiting:
                self._changed.wait()
            if chosen is None:
                self._loader = None
                return None
            self._arriving, leaving = chosen
            gone = self._evict(leaving)
        _free(gone)
        return self._arriving

    def _queue(self) -> list[tuple[str, int]]:
        """The lock is held. Names and bytes, oldest first."""
        return [(name, self._sizes[name]) for name in self._waiting.names()]

    def _bring(self, name: str) -> None:
        """Into the room that was made, and a lease for each who asked; or an error for each."""
        try:
            reader = self._readers.get(name) or self._read(name)
        except (StartupError, InferenceError) as exc:
            self._refuse(name, exc)
            return
        if reader is not None:
            self._hand_out(name, reader)

    def _read(self, name: str) -> FeatureReader | None:
        """The SAE where it is used. None if it is larger than was thought, and has to wait for more room."""
        master = self._masters.fetch(self._specs[name])
        if not self._has_room(name, master.n_bytes):
            _free([master] if self._on_host else [])
            return None
        if self._on_host:
            return master
        reader = self._place(master, self._device)
        self._counts["uploads"] += 1
        return reader

    def _has_room(self, name: str, n_bytes: int) -> bool:
        """Whether what was read can stay, now that its size is known for certain; for an unknown one room is made."""
        with self._changed:
            self._sizes[name] = n_bytes
            self._check_size(name)
            leaving = self._residency.leaving_for(n_bytes)
            gone = self._evict(leaving or [])
        _free(gone)
        return leaving is not None

    def _check_size(self, name: str) -> None:
        if self._budget is not None and self._sizes[name] > self._budget:
            size, budget = self._sizes[name] / 2**30, self._budget / 2**30
            raise StartupError(
                f"SAE {name!r} takes {size:.4g} GiB, but SAE_MEMORY_GIB leaves {budget:.4g} GiB for all together; "
                "raise SAE_MEMORY_GIB, or leave the source out with EXCLUDE_SAE."
            )

    def _evict(self, names: Sequence[str]) -> list[FeatureReader]:
        """The lock is held. What is returned is to be freed without it."""
        for name in names:
            self._residency.remove(name)
        self._counts["evictions"] += len(names)
        return [self._readers.pop(name) for name in names]

    def _refuse(self, name: str, exc: StartupError | InferenceError) -> None:
        if isinstance(exc, StartupError) and name in self._sources:
            error = EngineFailed(f"Source {name!r} could not be loaded again.")
            error.__cause__ = exc
        else:
            error = exc
        with self._changed:
            futures = self._waiting.take([name])
        refuse(futures, error)

    def _hand_out(self, name: str, reader: FeatureReader) -> None:
        with self._changed:
            if name not in self._readers:
                self._residency.add(name, self._sizes[name])
                self._readers[name] = reader
                self._sources[name] = reader.source
                self._peak_bytes = max(self._peak_bytes, self._residency.n_bytes)
            leases = [(future, self._lease(name)) for future in self._waiting.take([name])]
        for future, lease in leases:
            grant(future, lease)


def _free(readers: Sequence[FeatureReader]) -> None:
    for reader in readers:
        reader.free()


def _closed() -> NotReady:
    return NotReady("The server is stopping: its SAEs are not served any more.")
