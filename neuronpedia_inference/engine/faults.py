"""What an exception from the device means for the request and for the process."""

from __future__ import annotations

import torch

from neuronpedia_inference.errors import EngineFailed, InferenceError, OutOfMemory


def as_inference_error(exc: Exception) -> InferenceError:
    """The error a caller sees. Anything unforeseen says nothing of itself: its details belong in the log."""
    if isinstance(exc, InferenceError):
        return exc
    if isinstance(exc, torch.OutOfMemoryError):
        return OutOfMemory("The device ran out of memory. Send a shorter or smaller request, or try again soon.")
    return EngineFailed("The engine failed on this request. The server's log has the details under the request id.")


def poisons_device(exc: Exception) -> bool:
    """True when nothing can run on the device any more, as after a device-side assert."""
    return isinstance(exc, torch.AcceleratorError)


def free_caches() -> None:
    """Give cached device memory back after an allocator failure."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
