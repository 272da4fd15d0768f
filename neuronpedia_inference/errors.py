"""Every way a request can fail, as one tree.

InferenceError
├── InvalidRequest          400  the caller asked for something that cannot be done
│   ├── UnknownSource       400  no such SAE source or source set here
│   ├── UnknownPoint        400  no such hook point in this model
│   ├── UnknownVector       404  a digest whose vector is not kept here
│   ├── NoJacobianLens      400  this model has no Jacobians
│   ├── UnknownModel        404  OpenAI's routes: neither the served model nor a variant of it
│   └── LimitExceeded       400  a bound was passed; the message names value, bound and remedy
├── MalformedHttp           400  not HTTP; answered by the connection, before there is a request
├── Unauthorized            401
├── Forbidden               403  a web page, or a name of this server, that is not allowed
├── RequestTimeout          408  the request did not come in whole in time
├── Conflict                409  the server's state forbids it
├── BodyTooLarge            413
├── Busy                    429  it would have to wait, and was not to
├── HeadTooLarge            431  likewise answered by the connection
├── Unavailable             503  try again later
│   ├── NotReady            503  the model is still loading
│   ├── Overloaded          503  no room for another request now
│   ├── SourceComing        503  an SAE that was asked for is being fetched
│   └── OutOfMemory         503  the device ran out of memory; its caches were freed
└── EngineFailed            500  our fault; details are in the server's log under the request id

StartupError and EngineDied are not part of the tree. The first stops a process before it serves, the second ends one
that serves; both with one line.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


class InferenceError(Exception):
    """Root of the errors a caller can see. Positional arguments only, so that it pickles."""

    code = "internal"
    status = 500
    request_id = ""
    """Of the request at the service that the client asked; empty where it has none."""

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__

    @property
    def beside(self) -> Mapping[str, Any]:
        """What its body has beside error, code and request id."""
        return {}


class InvalidRequest(InferenceError):
    code = "invalid_request"
    status = 400


NO_SAES = "This server has no SAEs: SAE_SETS or LOCAL_SAE_DIR give it some."


class UnknownSource(InvalidRequest):
    """`UnknownSource(message)`; `UnknownSource.named` builds the message."""

    code = "unknown_source"

    @classmethod
    def named(cls, kind: str, name: str, known: Iterable[str]) -> UnknownSource:
        """kind: "source" or "source set"; known: what is served here."""
        names = list(known)
        return cls(unknown_name(kind, name, names) + ("" if names else f" {NO_SAES}"))


class UnknownPoint(InvalidRequest):
    code = "unknown_hook"


class UnknownVector(InvalidRequest):
    code = "unknown_vector"
    status = 404


class NoJacobianLens(InvalidRequest):
    """`NoJacobianLens(message, why)`"""

    code = "no_jacobian_lens"

    @property
    def beside(self) -> dict[str, str]:
        return {"status": "unavailable", "detail": str(self.args[1]) if len(self.args) > 1 else ""}


class UnknownModel(InvalidRequest):
    code = "model_not_found"
    status = 404


class LimitExceeded(InvalidRequest):
    code = "limit_exceeded"


class MalformedHttp(InferenceError):
    code = "malformed_http"
    status = 400


class Unauthorized(InferenceError):
    code = "unauthorized"
    status = 401


class Forbidden(InferenceError):
    code = "forbidden"
    status = 403


class RequestTimeout(InferenceError):
    code = "request_timeout"
    status = 408


class Conflict(InferenceError):
    code = "conflict"
    status = 409


class BodyTooLarge(InferenceError):
    code = "body_too_large"
    status = 413


BUSY = "Server is busy with another request"


class Busy(InferenceError):
    code = "busy"
    status = 429

    @property
    def beside(self) -> dict[str, bool]:
        return {"busy": True}


class HeadTooLarge(InferenceError):
    code = "head_too_large"
    status = 431


class Unavailable(InferenceError):
    """Answered with `Retry-After: retry_after_s`."""

    code = "unavailable"
    status = 503
    retry_after_s = 1


class NotReady(Unavailable):
    code = "not_ready"
    retry_after_s = 5


class Overloaded(Unavailable):
    code = "overloaded"


class SourceComing(Unavailable):
    code = "source_coming"
    retry_after_s = 10


class OutOfMemory(Unavailable):
    code = "out_of_memory"
    retry_after_s = 2


class EngineFailed(InferenceError):
    code = "engine_failed"


class StartupError(Exception):
    """The process cannot start; the text is one line that names what to mend."""


class EngineDied(Exception):
    """The device has failed or the worker has died, and only a new process helps; the text is one line."""


def let_go(failure: BaseException) -> None:
    """Free what the frames of a failure hold, which may be most of the memory there is.

    They hold it too, in a circle that would wait for the garbage collector.
    """
    seen: set[int] = set()
    chain: BaseException | None = failure
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        traceback.clear_frames(chain.__traceback__)
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__


def unknown_name(kind: str, name: str, known: Iterable[str], *, most: int = 12) -> str:
    """One sentence: what is unknown, the nearest names, and what exists."""
    names = list(known)
    text = f"Unknown {kind} {name!r}.{did_you_mean(name, names)}"
    if names:
        more = f" and {len(names) - most} more" if len(names) > most else ""
        text += f" Available: {', '.join(names[:most])}{more}."
    return text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the nearest names and a blank before it; empty where none is near."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
