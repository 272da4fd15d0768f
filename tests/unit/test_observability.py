"""Logs that hold no secret, and reports to Sentry that are real, few and clean."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sentry_sdk
from fastapi.testclient import TestClient
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from neuronpedia_inference.errors import EngineFailed, InvalidRequest, NotReady, OutOfMemory, Overloaded, Unauthorized
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.observability import (
    STARS,
    Redactor,
    bound_request_id,
    is_reported,
    new_request_id,
    peak_memory_bytes,
    report,
    request_id,
    start_logging,
    start_sentry,
)
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.app import create_app

SECRET = "open sesame/42"
DSN = "https://0123456789abcdef@errors.example.org/7"
TOKEN = "hf_" + "x1Y2" * 8
PROMPT = "a very private prompt"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    traced = {"sentry_dsn": DSN, "sentry_traces_sample_rate": 1.0, "sentry_profiles_sample_rate": 0.0}
    return Settings.read(secret=SECRET, log_format="json", **traced)


# Request ids


def test_request_ids_nest_and_end() -> None:
    assert request_id() == "-"
    with bound_request_id("outer"):
        with bound_request_id("inner"):
            assert request_id() == "inner"
        assert request_id() == "outer"
    assert request_id() == "-"


@pytest.mark.parametrize("sane", ["a", "trace:1.2_3-4", "0" * 128])
def test_a_sane_request_id_is_kept(sane: str) -> None:
    assert new_request_id(sane) == sane


@pytest.mark.parametrize("insane", ["", "a b", "0" * 129, "é", "a\nb", "<b>", "a\n"])
def test_any_other_request_id_is_replaced(insane: str) -> None:
    assert new_request_id(insane) not in (insane, "")
    assert new_request_id(insane) != new_request_id(insane)


# Redaction and logs


def test_redaction_goes_everywhere(settings: Settings) -> None:
    redactor = Redactor.of(settings)
    found = {"a": [f"x{SECRET}y", (DSN, 3)], f"{TOKEN}": {"b": "open%20sesame%2F42"}, "n": None, "f": 1.5}
    cleaned = redactor.value(found)
    assert cleaned == {"a": [f"x{STARS}y", [STARS, 3]], STARS: {"b": STARS}, "n": None, "f": 1.5}


def test_a_token_nobody_told_us_of_is_redacted() -> None:
    assert Redactor([]).text(f"Bearer {TOKEN}.") == f"Bearer {STARS}."
    assert Redactor(["", "ab"]).text("abc") == f"{STARS}c"


def test_json_lines(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(settings)
    start_logging(settings)
    log = logging.getLogger("neuronpedia_inference.engine")
    with bound_request_id("id-1"):
        log.info("done\nreally", extra={"n_tokens": 5, "seconds": 0.25})
        try:
            raise ValueError(f"bad {SECRET}")
        except ValueError:
            log.exception("failed")
    log.debug("too small to be said")
    logging.getLogger("elsewhere").info("nor is this")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["done\nreally", "failed"]
    assert lines[0] | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "neuronpedia_inference.engine",
        "request_id": "id-1",
        "message": "done\nreally",
        "n_tokens": 5,
        "seconds": 0.25,
    }
    assert f"ValueError: bad {STARS}" in lines[1]["traceback"]


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(Settings.read(secret=SECRET, log_level="warning"))
    log = logging.getLogger("neuronpedia_inference.web")
    log.info("not said")
    log.warning("slow %s", SECRET, extra={"path": "/v1/x\nforged line", "ms": 12.5})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f'warning - web: slow {STARS} path="/v1/x\\nforged line" ms=12.5')


def test_peak_memory_is_plausible() -> None:
    assert 10 * 2**20 < peak_memory_bytes() < 2**40


# Sentry


class Kept(Transport):
    """A transport that keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.envelopes: list[Envelope] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.envelopes.append(envelope)

    def of(self, kind: str) -> list[dict[str, Any]]:
        items = [item for envelope in self.envelopes for item in envelope.items if item.headers.get("type") == kind]
        return [item.payload.json or {} for item in items]


@pytest.fixture
def kept(settings: Settings) -> Iterator[Kept]:
    transport = Kept()
    with sentry_sdk.isolation_scope():
        assert start_sentry(settings, transport=transport)
        yield transport
        sentry_sdk.get_client().close()
        sentry_sdk.get_global_scope().set_client(None)


class FakeRuntime:
    """Fails as told when a text is tokenised."""

    def __init__(self, exc: Exception) -> None:
        self._exc = exc
        self.settings = Settings.read()
        self.metrics = Metrics()

    def __getattr__(self, name: str) -> Any:
        local_that_must_not_leave = PROMPT
        raise self._exc from ValueError(f"cause with {SECRET} and {TOKEN} near {len(local_that_must_not_leave)}")


def call(settings: Settings, exc: Exception) -> int:
    client = TestClient(create_app(settings, lambda: FakeRuntime(exc)), raise_server_exceptions=False)  # pyright: ignore[reportArgumentType]
    headers = {"X-SECRET-KEY": SECRET, "Authorization": f"Basic {TOKEN}", "X-Request-Id": "id-9"}
    client.cookies.set("session", "cookie-value")
    body = {"model": "m", "text": PROMPT}
    return client.post(f"/v1/tokenize?key={TOKEN}", json=body, headers=headers).status_code


def test_a_fault_is_reported_once_and_clean(settings: Settings, kept: Kept) -> None:
    logging.getLogger("neuronpedia_inference").info("breadcrumb with %s", SECRET)
    assert call(settings, RuntimeError(f"broken near {SECRET}")) == 500
    (event,) = kept.of("event")
    assert event["exception"]["values"][-1]["type"] == "RuntimeError"
    assert event["exception"]["values"][-1]["value"] == f"broken near {STARS}"
    assert event["tags"]["request_id"] == "id-9"
    assert "tokenize" in event["transaction"]
    assert event["request"]["method"] == "POST"
    assert "data" not in event["request"]
    assert "cookies" not in event["request"]
    traces = [exc["stacktrace"]["frames"] for exc in event["exception"]["values"] if "stacktrace" in exc]
    assert traces
    assert all("vars" not in frame for trace in traces for frame in trace)
    for payload in [event, *kept.of("transaction")]:
        text = json.dumps(payload)
        for private in (SECRET, "open%20sesame", DSN, TOKEN, PROMPT, "cookie-value"):
            assert private not in text


def test_traces_name_the_operation(settings: Settings, kept: Kept) -> None:
    call(settings, InvalidRequest("no"))
    (transaction,) = kept.of("transaction")
    assert "tokenize" in transaction["transaction"]


@pytest.mark.parametrize("exc", [InvalidRequest("no"), NotReady("no"), Overloaded("no"), Unauthorized("no")])
def test_what_is_expected_is_not_reported(settings: Settings, kept: Kept, exc: Exception) -> None:
    assert call(settings, exc) < 504
    report(exc)
    sentry_sdk.capture_exception(exc)
    assert kept.of("event") == []


@pytest.mark.parametrize("exc", [EngineFailed("x"), OutOfMemory("x"), KeyError("x")])
def test_what_is_a_fault(exc: Exception) -> None:
    assert is_reported(exc)


def test_bad_bodies_and_unknown_paths_are_not_reported(settings: Settings, kept: Kept) -> None:
    client = TestClient(create_app(settings, lambda: FakeRuntime(EngineFailed("x"))))  # pyright: ignore[reportArgumentType]
    headers = {"X-SECRET-KEY": SECRET}
    statuses = [
        client.post("/v1/tokenize", json={"text": PROMPT}, headers=headers).status_code,
        client.get("/nothing", headers=headers).status_code,
        client.get("/nothing").status_code,
        client.post("/initialize", headers=headers).status_code,
    ]
    assert statuses == [422, 404, 401, 409]
    assert kept.of("event") == []


def test_without_a_dsn_sentry_stays_off() -> None:
    assert not start_sentry(Settings.read())
    assert not sentry_sdk.is_initialized()
    report(RuntimeError("nobody hears this"))
