"""Which pages of a file are in the kernel's cache, counted by mincore(2) (Linux only)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

PAGE = mmap.PAGESIZE


def cached_pages(file: Path) -> set[int]:
    """Their numbers. Raises OSError where the kernel does not tell."""
    n_pages = -(-file.stat().st_size // PAGE)
    found = (ctypes.c_ubyte * n_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), found)
        del first  # or the mapping could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return {number for number, flags in enumerate(found) if flags & 1}


def forget(file: Path) -> bool:
    """Have none of a file in the cache; False where the file system keeps its pages in memory."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not cached_pages(file)


def pages_of(start: int, n_bytes: int) -> set[int]:
    """On which so many bytes of a file lie."""
    return set(range(start // PAGE, -(-(start + n_bytes) // PAGE)))
