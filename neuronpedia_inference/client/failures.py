"""Errors of the service as the classes that they are there, with the id under which its log has more."""

from __future__ import annotations

import re
from collections.abc import Iterator

from neuronpedia_inference.errors import InferenceError, Unavailable

REQUEST = re.compile(r" \(request ([^()\s]*)\)$")
CODED = re.compile(r"([a-z][a-z_]+): (.*)", re.DOTALL)


def failure(code: str, message: str, request_id: str, retry_after_s: int | None = None) -> InferenceError:
    """The error of that code; `request_id` is an attribute of it. An unknown code is an InferenceError."""
    kind = _kinds().get(code, InferenceError)
    exc = kind(message)
    exc.code, exc.request_id = code, request_id
    exc.add_note(f"code {code}, request id {request_id or 'unknown'}")
    if retry_after_s is not None and isinstance(exc, Unavailable):
        exc.retry_after_s = retry_after_s
    return exc


def failure_from_text(exc: Exception) -> InferenceError | None:
    """Of a built-in error whose text begins with a code, as a deployed class raises them; None for any other."""
    coded = CODED.fullmatch(str(exc))
    if coded is None or coded[1] not in _kinds():
        return None
    found = REQUEST.search(coded[2])
    return failure(coded[1], REQUEST.sub("", coded[2]), found[1] if found else "")


def _kinds() -> dict[str, type[InferenceError]]:
    return {kind.code: kind for kind in _tree(InferenceError)}


def _tree(kind: type[InferenceError]) -> Iterator[type[InferenceError]]:
    """A class and those below it that have a code of their own."""
    if "code" in vars(kind):
        yield kind
    for inner in kind.__subclasses__():
        yield from _tree(inner)
