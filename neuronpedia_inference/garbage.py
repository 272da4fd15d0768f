"""When the garbage collector stays away."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is looked through inside. Imports make millions of objects that stay, and looking through them again and
    again takes a fifth of a start."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def settle() -> None:
    """For a process that serves from now on: what is loaded stays, and is no garbage collector's business.

    Going over all of it again and again would hold the interpreter for tenths of a second each time. Called again, it
    goes over what has come since.
    """
    gc.collect()
    gc.freeze()
