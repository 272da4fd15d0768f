"""Running to its end what would give way to others."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")


def result_of(steps: Generator[Any, Any, T]) -> T:
    """What the generator returns; it must wait for nothing."""
    while True:
        try:
            assert next(steps) is None
        except StopIteration as end:
            return end.value
