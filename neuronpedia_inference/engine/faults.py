"""What an exception from the device means for the request and for the process."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from neuronpedia_inference.errors import EngineFailed, InferenceError, OutOfMemory, StartupError

log = logging.getLogger(__name__)

_HOST_FAILURES = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "unable to mmap",
    "Cannot allocate memory",
    "std::bad_alloc",
)
"""What torch and the files it maps say of a host's memory, in errors that have no type of their own."""


def as_inference_error(exc: Exception) -> InferenceError:
    """The error a caller sees. Anything unforeseen says nothing of itself: its details belong in the log."""
    if isinstance(exc, InferenceError):
        return exc
    if wants_memory(exc):
        return OutOfMemory("The device ran out of memory. Send a shorter or smaller request, or try again soon.")
    return EngineFailed("The engine failed on this request. The server's log has the details under the request id.")


def wants_memory(exc: BaseException) -> bool:
    """Whether an allocation has failed, on a device or on the host."""
    if isinstance(exc, torch.OutOfMemoryError | OutOfMemory | MemoryError):
        return True
    return isinstance(exc, RuntimeError | OSError | StartupError) and any(text in str(exc) for text in _HOST_FAILURES)


def failure_of(work: Callable[[], object]) -> Exception | None:
    """What `work` raised, if anything. One of the two broad handlers: no request may take the worker with it."""
    try:
        work()
    except Exception as exc:
        return exc
    return None


def trial_failure(what: str, trial: Callable[[], object]) -> Exception | None:
    """As `failure_of`, for what is tried of a model. Want of memory says nothing of the model, and is raised.

    what: in the log, where the failure is one line, and all of it at the level of debug.
    """
    failure = failure_of(trial)
    if failure is None:
        return None
    if isinstance(as_inference_error(failure), OutOfMemory):
        raise failure
    log.info("%s was tried and is not served: %s", what, in_short(failure))
    log.debug("%s was tried", what, exc_info=failure)
    return failure


def in_short(failure: BaseException) -> str:
    """Its first line, for a reason or a line of the log; with its kind unless it is an error of our own."""
    line = str(failure).partition("\n")[0][:120]
    return line if isinstance(failure, InferenceError) else f"{type(failure).__name__}: {line}"


def poisons_device(exc: Exception) -> bool:
    """True when nothing can run on the device any more, as after a device-side assert."""
    return isinstance(exc, torch.AcceleratorError)


def free_caches() -> None:
    """Give cached device memory back after an allocator failure."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
