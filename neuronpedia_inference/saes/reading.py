"""What goes wrong when files of others are read, as one line."""

from __future__ import annotations

from pickle import UnpicklingError

from safetensors import SafetensorError

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
)
"""What those who read them raise."""


def line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__
