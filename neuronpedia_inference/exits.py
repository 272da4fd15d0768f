"""How a process ends: its exit codes, which docs/operating.md explains, and an end that waits for nothing."""

from __future__ import annotations

import os
from typing import NoReturn

from neuronpedia_inference.embedded.scratch import discard_unfinished

STOPPED = 0
FAILED = 1
WRONG_USAGE = 2
ENGINE_DIED = 3
DIFFERS = 4
NOT_COMPARABLE = 5


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
