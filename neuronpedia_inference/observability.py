"""Logs, request ids and Sentry. What is written has sizes and times, never prompts, vectors or secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote
from uuid import uuid4

from neuronpedia_inference.errors import InferenceError, NotReady, Overloaded

if TYPE_CHECKING:
    from sentry_sdk.transport import Transport
    from sentry_sdk.types import Event, Hint

    from neuronpedia_inference.secrets_file import SecretsFile
    from neuronpedia_inference.settings import Settings

STARS = "[hidden]"
PACKAGE = "neuronpedia_inference"
# Read by the libraries that download, not by us; known here only to be kept out of logs and reports.
FOREIGN_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
HIDDEN_HEADERS = frozenset({"x-secret-key", "authorization", "proxy-authorization", "cookie", "set-cookie"})

# What every record has; anything more came with `extra=` and is a field of the line. (color_message is uvicorn's.)
_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
_request_id: ContextVar[str] = ContextVar("request_id", default="-")
_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


def request_id() -> str:
    """The id of the request being answered, "-" outside of one."""
    return _request_id.get()


def new_request_id(proposed: str = "") -> str:
    """`proposed` when it is short and plain, else a fresh id."""
    return proposed if _SANE_ID.fullmatch(proposed) else uuid4().hex


@contextmanager
def bound_request_id(value: str) -> Iterator[str]:
    """Every log line inside carries `value`."""
    token = _request_id.set(value)
    try:
        yield value
    finally:
        _request_id.reset(token)


class Redactor:
    """Replaces secrets wherever they stand in a text, plain or percent-encoded."""

    def __init__(self, secrets: Iterable[str], file: SecretsFile | None = None) -> None:
        self._own = tuple(secrets)
        self._file = file
        self._named: Mapping[str, str] = {}
        self._pattern = self._compiled()

    def _compiled(self) -> re.Pattern[str]:
        secrets = (*self._own, *self._named.values())
        forms = {form for secret in secrets if secret for form in (secret, quote(secret, safe=""))}
        longest_first = sorted(map(re.escape, forms), key=len, reverse=True)
        return re.compile("|".join([*longest_first, r"\bhf_[A-Za-z0-9]{20,}\b"]))

    @classmethod
    def of(cls, settings: Settings) -> Redactor:
        own = [value.get_secret_value() for value in (settings.secret, settings.sentry_dsn) if value]
        foreign = [os.environ.get(name, "") for name in FOREIGN_TOKENS]
        return cls([*own, *foreign], settings.read_secrets())

    def text(self, text: str) -> str:
        if self._file is not None and self._file.named() is not self._named:
            self._named = self._file.named()
            self._pattern = self._compiled()
        return self._pattern.sub(STARS, text)

    def value(self, value: Any) -> Any:
        """The same structure with every text in it redacted, keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item) for item in value]
        return value


# Logs


class _Lines(logging.Formatter):
    """One record, one line, redacted; a traceback follows it in text and is a field in JSON."""

    def __init__(self, redactor: Redactor, *, as_json: bool) -> None:
        super().__init__()
        self._redactor = redactor
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in _RECORD}
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        line = self._json(record, fields, trace) if self._as_json else self._text(record, fields, trace)
        return self._redactor.text(line)

    def _json(self, record: logging.LogRecord, fields: dict[str, Any], trace: str) -> str:
        head = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id(),
            "message": record.getMessage(),
        }
        return json.dumps({**fields, **head, **({"traceback": trace} if trace else {})}, default=str)

    def _text(self, record: logging.LogRecord, fields: dict[str, Any], trace: str) -> str:
        name = record.name.removeprefix(f"{PACKAGE}.")
        pairs = "".join(f" {key}={_plain(value)}" for key, value in fields.items())
        head = f"{_time_of(record)} {record.levelname.lower():7} {request_id()} {name}: {record.getMessage()}"
        return "\n".join(filter(None, [head.replace("\n", " ") + pairs, trace]))


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> str:
    """A value that cannot break its line: quoted as soon as it is not a simple word."""
    text = str(value)
    return text if re.fullmatch(r"[\w./:+\-]+", text) else json.dumps(text)


def start_logging(settings: Settings) -> None:
    """Lines go to standard error. A second call replaces what the first one set up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(PACKAGE)
    handler.setFormatter(_Lines(Redactor.of(settings), as_json=settings.log_format == "json"))
    root = logging.getLogger()
    root.handlers = [old for old in root.handlers if old.get_name() != PACKAGE] + [handler]
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger(PACKAGE).setLevel(level)


# Sentry


def is_reported(exc: BaseException) -> bool:
    """Faults of ours are; what callers get wrong, and a full or starting server, are not."""
    if isinstance(exc, NotReady | Overloaded):
        return False
    status = exc.status if isinstance(exc, InferenceError) else getattr(exc, "status_code", 500)
    return not isinstance(status, int) or status >= 500


def report(exc: BaseException) -> None:
    """Send a fault to Sentry; nothing happens for other errors, or where Sentry is off."""
    import sentry_sdk

    if is_reported(exc) and sentry_sdk.is_initialized():
        with sentry_sdk.new_scope() as scope:
            scope.set_tag("request_id", request_id())
            scope.capture_exception(exc)


def start_sentry(settings: Settings, *, transport: Transport | None = None) -> bool:
    """Start Sentry if SENTRY_DSN is set; says whether it runs. Doors call it, importing never does.

    `transport` replaces the network.
    """
    if settings.sentry_dsn is None:
        return False
    import sentry_sdk
    from sentry_sdk.integrations.fastapi import FastApiIntegration
    from sentry_sdk.integrations.logging import LoggingIntegration
    from sentry_sdk.integrations.starlette import StarletteIntegration

    scrub = Scrubber(Redactor.of(settings))
    sentry_sdk.init(
        dsn=settings.sentry_dsn.get_secret_value(),
        environment=settings.sentry_environment,
        release=settings.sentry_release,
        traces_sample_rate=settings.sentry_traces_sample_rate,
        profile_lifecycle="trace",
        profile_session_sample_rate=settings.sentry_profiles_sample_rate,
        # Log lines are breadcrumbs only: the boundary reports each fault once, with its exception.
        integrations=[StarletteIntegration(), FastApiIntegration(), LoggingIntegration(event_level=None)],
        auto_enabling_integrations=False,
        include_local_variables=False,
        max_request_body_size="never",
        before_send=scrub,
        before_send_transaction=scrub,
        transport=transport,
    )
    return True


class Scrubber:
    """`before_send`: drops expected errors, and takes out what a report must not hold."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor

    def __call__(self, event: Event, hint: Hint) -> Event | None:
        exc_info = hint.get("exc_info")
        if exc_info and isinstance(exc_info[1], BaseException) and not is_reported(exc_info[1]):
            return None
        scrubbed = self._redactor.value(_without_private_parts(cast("dict[str, Any]", event)))
        return cast("Event", scrubbed)


def _without_private_parts(event: dict[str, Any]) -> dict[str, Any]:
    """A copy without request bodies, cookies, secret headers, command lines and local variables."""
    event = {**event, "extra": {k: v for k, v in event.get("extra", {}).items() if k != "sys.argv"}}
    if "request" in event:
        request = {k: v for k, v in event["request"].items() if k not in ("data", "cookies", "env")}
        headers = request.get("headers") or {}
        request["headers"] = {k: STARS if k.lower() in HIDDEN_HEADERS else v for k, v in headers.items()}
        event["request"] = request
    for group in ("exception", "threads"):
        if group in event:
            event[group] = _without_locals(event[group])
    return event


def _without_locals(value: Any) -> Any:
    """The same structure without the `vars` of stack frames."""
    if isinstance(value, dict):
        return {k: _without_locals(v) for k, v in value.items() if k != "vars"}
    if isinstance(value, list):
        return [_without_locals(item) for item in value]
    return value


def peak_memory_bytes() -> int:
    """The most memory this process has held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
