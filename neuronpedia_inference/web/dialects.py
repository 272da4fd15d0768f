"""How the events of a stream are written: as server-sent events, or as lines of JSON.

A failure before the first event is an ordinary error answer. A later one ends the stream with an event of its own:
`event: error` and `data: {"error": ..., "code": ..., "request_id": ...}`, or a line of `"kind": "error"` and the same;
on OpenAI's routes `data: {"error": {...}}`, where a stream that is complete ends in `data: [DONE]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from neuronpedia_inference.web.answers import json_bytes


@dataclass(frozen=True)
class Dialect:
    media_type: str
    event: Callable[[bytes], bytes]
    """Of JSON without a line break."""
    error: Callable[[Mapping[str, Any]], bytes]
    """Of the body that an error answer would have."""
    end: bytes = b""
    """Behind the last event."""


def _sse(body: bytes) -> bytes:
    return b"data: %b\n\n" % body


def _line(body: bytes) -> bytes:
    return body + b"\n"


SSE = Dialect("text/event-stream", _sse, lambda body: b"event: error\n" + _sse(json_bytes(body)))
NDJSON = Dialect("application/x-ndjson", _line, lambda body: _line(json_bytes({"kind": "error", **body})))
OPENAI = Dialect(SSE.media_type, _sse, lambda body: _sse(json_bytes(body)), end=_sse(b"[DONE]"))
DIALECTS = {"sse": SSE, "ndjson": NDJSON, "openai": OPENAI}


def dialect_of(content_type: str) -> Dialect | None:
    """Of an answer; None for one that is no stream."""
    return next((one for one in DIALECTS.values() if content_type.startswith(one.media_type)), None)
