"""SHA-256 of files, computed beside everything else by one thread of low priority, and kept from start to start."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, get_native_id

from neuronpedia_inference import kept

PIECE_BYTES = 2**20
"""Read and hashed without a stop; the interpreter's lock is free meanwhile."""
LEAST_PRIORITY = 19


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was: what any change of it changes."""

    path: Path
    n_bytes: int
    changed_ns: int
    entry_changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Raises OSError."""
        about = path.stat()
        return cls(path, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file by its own name, without the folders that it lies in."""

    name: str
    n_bytes: int
    sha256: str


class FilesChanged(OSError):
    """A file is not any more what it was when it was loaded."""


Digests = tuple[FileDigest, ...]


class Hasher:
    """Safe to use from several threads. Its own thread begins with the first question, and holds up no exit."""

    def __init__(self, folder: Path) -> None:
        """folder: where digests are kept, by path, size, times and inode."""
        self._folder = folder
        self._waiting: SimpleQueue[tuple[Sequence[Stamp], Future[Digests]] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._is_closed = False

    def request(self, files: Sequence[Stamp]) -> Future[Digests]:
        """One digest per file, in order. Never waits. The future may get OSError: FilesChanged for a file that is not
        as its stamp says."""
        found: Future[Digests] = Future()
        if self._thread is None:
            self._thread = Thread(target=self._work, name="digests", daemon=True)
            self._thread.start()
        self._waiting.put((files, found))
        return found

    def close(self) -> None:
        """What is not known yet never will be."""
        self._is_closed = True
        self._waiting.put(None)

    def _work(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, get_native_id(), LEAST_PRIORITY)
        while (asked := self._waiting.get()) is not None:
            files, found = asked
            try:
                found.set_result(tuple(self._digest(stamp) for stamp in files))
            except OSError as exc:
                found.set_exception(exc)

    def _digest(self, stamp: Stamp) -> FileDigest:
        key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:24]
        file = self._folder / f"sha256-{key}.json"
        known = kept.read(file)
        if not (isinstance(known, str) and len(known) == 64):
            known = self._hashed(stamp)
            kept.write(file, known)
        if Stamp.of(stamp.path) != stamp:
            raise FilesChanged(f"{stamp.path.name} has changed since it was loaded")
        return FileDigest(stamp.path.name, stamp.n_bytes, known)

    def _hashed(self, stamp: Stamp) -> str:
        found, piece = hashlib.sha256(), bytearray(PIECE_BYTES)
        with stamp.path.open("rb", buffering=0) as opened:
            while n_bytes := opened.readinto(piece):
                found.update(memoryview(piece)[:n_bytes])
                if self._is_closed:
                    raise OSError("closed")
        if Stamp.of(stamp.path) != stamp:
            raise FilesChanged(f"{stamp.path.name} has changed since it was loaded")
        return found.hexdigest()
