"""How a process ends: its exit codes, which docs/operating.md explains, at once, or after threads in native code."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from threading import Thread
from typing import NoReturn
from weakref import WeakSet

from neuronpedia_inference.embedded.scratch import discard_unfinished

STOPPED = 0
FAILED = 1
WRONG_USAGE = 2
ENGINE_DIED = 3
DIFFERS = 4
NOT_COMPARABLE = 5
HALT_S = 10.0
"""How long an interpreter that ends waits for what is in native code."""

_beside: WeakSet[Thread] = WeakSet()


def by_signal(number: int) -> int:
    """The code of a process that a signal ended at once, as shells write it."""
    return 128 + number


def leave(code: int) -> NoReturn:
    """End the process now, whatever its threads are doing.

    A thread inside native code cannot be stopped. If the interpreter shuts down beside one, that thread ends as soon
    as it comes back for the interpreter's lock, and C++ answers by aborting the process.
    """
    discard_unfinished()
    os._exit(code)


def start_beside(name: str, work: Callable[..., None], *args: object) -> None:
    """`work(*args)` in a thread of its own, which an interpreter that ends waits for."""
    thread = Thread(target=work, args=args, name=name, daemon=True)
    _beside.add(thread)
    thread.start()


@atexit.register
def _wait() -> None:
    """After those that were registered later have stopped what would start more of them."""
    until_s = time.monotonic() + HALT_S
    while (under_way := [thread for thread in _beside if thread.is_alive()]) and time.monotonic() < until_s:
        under_way[0].join(until_s - time.monotonic())
