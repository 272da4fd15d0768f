"""Whether the request under way is to have the same bytes whatever the load, and after a restart.

Asked for by a field of the request or by a setting; read where its work is made. It goes with the request's task, so
that what lies between need not hand it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_WANTED: ContextVar[bool] = ContextVar("reproducible", default=False)


@contextmanager
def reproducibly(wanted: bool) -> Iterator[None]:
    """Work that is made inside is reproducible if `wanted`."""
    before = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(before)


def is_wanted() -> bool:
    return _WANTED.get()
