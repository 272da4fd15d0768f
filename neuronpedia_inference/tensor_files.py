"""The safetensors format: read from bytes, with nothing executed, as arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.schemas.vectors import widened

MEDIA_TYPE = "application/x-safetensors"
LENGTH_BYTES = 8
"""Of the number in front that says how long the header is."""
MAX_HEADER_BYTES = 2**16
NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4}
METADATA = "__metadata__"


def header_of(raw: bytes, *, most: int = MAX_HEADER_BYTES) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin. Raises ValueError, which says what is wrong."""
    n_bytes = int.from_bytes(raw[:LENGTH_BYTES], "little")
    if len(raw) < LENGTH_BYTES or n_bytes > len(raw) - LENGTH_BYTES:
        raise ValueError("it is shorter than its header says")
    if n_bytes > most:
        raise ValueError(f"its header has {n_bytes} bytes, the most is {most}")
    try:
        header = json.loads(raw[LENGTH_BYTES : LENGTH_BYTES + n_bytes])
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, LENGTH_BYTES + n_bytes


def read_tensors(raw: bytes, *, most: int = MAX_HEADER_BYTES) -> dict[str, Numbers]:
    """Every tensor by its name, in its shape; bfloat16 becomes float32. Raises ValueError, which says what is wrong.

    most: bytes of the header.
    """
    header, start = header_of(raw, most=most)
    return {name: _tensor(name, about, raw, start) for name, about in header.items() if name != METADATA}


def _tensor(name: str, about: Any, raw: bytes, start: int) -> Numbers:
    try:
        kind, shape, (first, last) = str(about["dtype"]), tuple(about["shape"]), about["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"its header says of {name[:80]!r} neither dtype, shape nor place") from None
    if kind not in NAMES:
        raise ValueError(f"{name[:80]!r} is in {kind[:16]}; {', '.join(NAMES)} are read")
    if not all(type(one) is int and one >= 0 for one in (*shape, first, last)):
        raise ValueError(f"shape or place of {name[:80]!r} are no whole numbers")
    if last - first != math.prod(shape) * ITEM_BYTES[kind] or start + last > len(raw):
        raise ValueError(f"{name[:80]!r} of shape {list(shape)[:8]} does not fill bytes {first} to {last} of the file")
    content = raw[start + first : start + last]
    read = widened(content, "bfloat16") if kind == "BF16" else np.frombuffer(content, NAMES[kind])
    return read.reshape(shape)


def answer_in(raw: bytes) -> Mapping[str, Any]:
    """What a file of tensors that a service answered with says beside them. Raises ValueError, KeyError."""
    header, _ = header_of(raw, most=len(raw))
    return json.loads(header[METADATA]["answer"])
