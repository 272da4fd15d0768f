"""Errors at the Modal boundary: built-in ones, because a caller has none of our classes."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager

from neuronpedia_inference.errors import (
    InferenceError,
    OutOfMemory,
    Overloaded,
    StartupError,
    UnknownPoint,
    UnknownSource,
)
from neuronpedia_inference.observability import report, request_id

BUILT_IN = frozenset(cls for cls in vars(builtins).values() if isinstance(cls, type) and issubclass(cls, Exception))


def builtin_error(exc: InferenceError) -> Exception:
    """The same error as a built-in one, whose text starts with the code: `limit_exceeded: Text too long ...`.

    | built-in       | what it was                                                          | try again? |
    |----------------|----------------------------------------------------------------------|------------|
    | `LookupError`  | a source, source set or hook that does not exist here                | no         |
    | `ValueError`   | every other request that cannot be answered (4xx)                    | no         |
    | `TimeoutError` | too many requests at once, or one that waited too long (503)         | yes        |
    | `MemoryError`  | the device ran out of memory (503)                                   | yes        |
    | `RuntimeError` | not ready, or a fault of the service (503, 500)                      | yes        |
    """
    text = f"{exc.code}: {exc.message}"
    if isinstance(exc, UnknownSource | UnknownPoint):
        return LookupError(text)
    if isinstance(exc, Overloaded):
        return TimeoutError(text)
    if isinstance(exc, OutOfMemory):
        return MemoryError(text)
    if exc.status < 500:
        return ValueError(text)
    return RuntimeError(f"{text} (request {request_id()})")


@contextmanager
def builtin_errors() -> Iterator[None]:
    """Turns our errors into built-in ones, and reports those that are our fault."""
    try:
        yield
    except InferenceError as exc:
        report(exc)
        raise builtin_error(exc) from None
    except StartupError as exc:
        raise RuntimeError(f"startup_failed: {exc}") from None
    except (RuntimeError, OSError, ValueError, LookupError) as exc:
        if type(exc) in BUILT_IN:
            raise
        raise _nearest(exc) from None


def _nearest(exc: Exception) -> Exception:
    """A library's error as the built-in one that it is made of: a caller may lack the library, as it lacks torch."""
    base = next(cls for cls in type(exc).__mro__ if cls in BUILT_IN)
    lines = str(exc).strip().splitlines() or [""]
    return base(f"{type(exc).__name__}: {lines[0]}")
