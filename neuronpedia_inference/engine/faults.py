"""What an exception from the device means for the request and for the process."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

import torch

from neuronpedia_inference.errors import EngineFailed, InferenceError, OutOfMemory

log = logging.getLogger(__name__)

_HOST_ALLOCATOR = "DefaultCPUAllocator"
"""Names torch's allocator on the host in its failures, which have no type of their own."""


def as_inference_error(exc: Exception) -> InferenceError:
    """The error a caller sees. Anything unforeseen says nothing of itself: its details belong in the log."""
    if isinstance(exc, InferenceError):
        return exc
    if isinstance(exc, torch.OutOfMemoryError | MemoryError) or _HOST_ALLOCATOR in str(exc):
        return OutOfMemory("The device ran out of memory. Send a shorter or smaller request, or try again soon.")
    return EngineFailed("The engine failed on this request. The server's log has the details under the request id.")


def failure_of(work: Callable[[], object]) -> Exception | None:
    """What `work` raised, if anything. One of the two broad handlers: no request may take the worker with it."""
    try:
        work()
    except Exception as exc:
        return exc
    return None


def trial_failure(trial: Callable[[], object]) -> Exception | None:
    """As `failure_of`, for what is tried of a model. Want of memory says nothing of the model, and is raised."""
    failure = failure_of(trial)
    if failure is None:
        return None
    if isinstance(as_inference_error(failure), OutOfMemory):
        raise failure
    log.debug("a trial at start failed: what it tried is not served", exc_info=failure)
    return failure


def let_go(failure: BaseException) -> None:
    """Free what the frames of a failure hold, which may be most of the memory there is."""
    seen: set[int] = set()
    chain: BaseException | None = failure
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        traceback.clear_frames(chain.__traceback__)
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__


def poisons_device(exc: Exception) -> bool:
    """True when nothing can run on the device any more, as after a device-side assert."""
    return isinstance(exc, torch.AcceleratorError)


def free_caches() -> None:
    """Give cached device memory back after an allocator failure."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
