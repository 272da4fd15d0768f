"""Folders that are filled beside their place and then renamed to it. What a killed process left is removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays there
    fcntl = None

_unfinished: set[Path] = set()


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """An empty folder on the same disk, removed at the end unless it has been renamed. Raises OSError."""
    with ExitStack() as until_done:
        with _locked(folder.parent):  # until it is locked itself somebody could take it for an orphan
            path = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            until_done.enter_context(_locked(path))
        _unfinished.add(path)
        until_done.callback(_unfinished.discard, path)
        until_done.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def remove_orphans(parent: Path, pattern: str) -> None:
    """Remove the scratch folders in `parent` that no living process fills, on this machine or in its containers."""
    with contextlib.suppress(OSError), _locked(parent):
        for path in parent.glob(pattern):
            with contextlib.suppress(OSError), _locked(path, waits=False) as is_orphan:
                if is_orphan:
                    shutil.rmtree(path, ignore_errors=True)


def discard_unfinished() -> None:
    """Remove what this process is filling: it ends now."""
    for path in tuple(_unfinished):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, waits: bool = True) -> Iterator[bool]:
    """A lock on a folder until the end of the block or of the process; whether it is held. Some disks have none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield fcntl is not None and _flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        return False
    return True
