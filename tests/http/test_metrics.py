"""`/metrics` over a real port: what clients were answered is what it says, whatever way their requests ended."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import (
    MODEL,
    SECRET,
    SOON_S,
    SOURCE,
    TEXT,
    Serve,
    Served,
    Wrapped,
    hang_up,
    raising,
    small_settings,
    until,
    writing,
)

from neuronpedia_inference.errors import EngineFailed, NotReady, OutOfMemory, Overloaded
from neuronpedia_inference.runtime import Runtime

TOKENIZE = {"model": MODEL, "text": TEXT}
SINGLE = {"prompt": TEXT, "model": MODEL, "source": SOURCE, "index": "5"}
STEER = {
    "prompt": "Once upon a time",
    "model": MODEL,
    "steer_method": "SIMPLE_ADDITIVE",
    "normalize_steering": False,
    "types": ["STEERED", "DEFAULT"],
    "features": [{"model": MODEL, "source": SOURCE, "index": 5, "strength": 1}],
    "n_completion_tokens": 6,
    "temperature": 0,
    "strength_multiplier": 1,
    "freq_penalty": 0,
    "seed": 16,
    "n_logprobs": 1,
}
Values = dict[tuple[str, ...], float]


def values(http: httpx.Client) -> Values:
    """Every value by its name and its labels' values."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {(s.name, *(s.labels[key] for key in sorted(s.labels))): s.value for f in families for s in f.samples}


@contextmanager
def counting(http: httpx.Client, **expected: int) -> Iterator[None]:
    """Requests that end within, of any operation, by outcome: exactly these."""
    before = values(http)
    yield
    deadline = time.monotonic() + SOON_S
    while (found := ended(before, values(http))) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found == expected


def ended(before: Values, after: Values) -> dict[str, int]:
    found: Counter[str] = Counter()
    for series, count in after.items():
        if series[0] == "neuronpedia_requests_total":
            found[series[2]] += int(count - before.get(series, 0))
    return dict(+found)


def rise(before: Values, after: Values, *series: str) -> float:
    name = ("neuronpedia_" + series[0], *series[1:])
    return after[name] - before[name]


# The route


def test_the_route(http: httpx.Client) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert http.post("/metrics").status_code == 405


def test_the_route_asks_for_the_secret(locked_server: Served) -> None:
    with locked_server.client() as client:
        assert client.get("/metrics").status_code == 401
    with locked_server.client(SECRET) as client:
        assert client.get("/metrics").status_code == 200


def test_before_the_model_is_loaded(serve: Serve) -> None:
    def loading() -> Any:
        raise NotReady("The model is still loading")

    with serve(small_settings(), loading).client() as client:
        answer = client.get("/metrics")
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert client.post("/v1/tokenize", content=b"{").status_code == 422


# Requests


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (SINGLE, 200),
        ({**SINGLE, "source": "99-res-4k"}, 400),
        ({**SINGLE, "prompt": "word " * 100}, 400),
        ({"prompt": TEXT}, 422),
    ],
)
def test_answers_and_refusals(http: httpx.Client, body: dict[str, Any], status: int) -> None:
    with counting(http, **{"answered" if status == 200 else "refused": 1}):
        assert http.post("/v1/activation/single", json=body).status_code == status


def test_a_body_that_is_not_json_is_refused(http: httpx.Client) -> None:
    with counting(http, refused=1):
        answer = http.post("/v1/tokenize", content=b"{", headers={"Content-Type": "application/json"})
        assert answer.status_code == 422


def test_what_reaches_no_operation_does_not_count(http: httpx.Client, locked_server: Served) -> None:
    with counting(http), locked_server.client() as client:
        assert client.post("/v1/tokenize", json=TOKENIZE).status_code == 401
        assert http.post("/v1/nothing", json=TOKENIZE).status_code == 404
        assert http.get("/v1/tokenize").status_code == 405


@pytest.mark.parametrize(
    ("exc", "outcome"),
    [
        (Overloaded("Full"), "overloaded"),
        (OutOfMemory("Full"), "failed"),
        (EngineFailed("Broken"), "failed"),
        (ValueError("unforeseen"), "failed"),
    ],
)
def test_faults(runtime: Runtime, serve: Serve, exc: Exception, outcome: str) -> None:
    faulty = Wrapped(runtime, ask=partial(raising, exc))
    with serve(small_settings(), lambda: faulty).client() as client, counting(client, **{outcome: 1}):
        assert client.post("/v1/activation/single", json=SINGLE).status_code >= 500


def test_a_stream_counts_at_its_last_event(http: httpx.Client) -> None:
    body = {**STEER, "prompt": "Once", "stream": True, "n_completion_tokens": 50}
    with counting(http, answered=1):
        before = values(http)
        with http.stream("POST", "/v1/steer/completion", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert ended(before, values(http)) == {}, "it has begun, with status 200, but it has not ended"
            assert len([line for line in lines if line]) >= 4


def test_a_stream_that_is_refused(http: httpx.Client) -> None:
    with counting(http, refused=1):
        unknown = [{"model": MODEL, "source": "99-res-4k", "index": 5, "strength": 1}]
        body = {**STEER, "stream": True, "features": unknown}
        assert http.post("/v1/steer/completion", json=body).status_code == 400


def test_hanging_up_on_a_stream(http: httpx.Client) -> None:
    body = {**STEER, "prompt": "Once", "stream": True, "n_completion_tokens": 40}
    with counting(http, cancelled=1), http.stream("POST", "/v1/steer/completion", json=body) as answer:
        assert len(list(itertools.islice(answer.iter_lines(), 3))) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_before_the_answer(runtime: Runtime, serve: Serve, stream: bool) -> None:
    begun = threading.Event()

    class Silent:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> Any:
            begun.set()
            await asyncio.sleep(3600)

    served = serve(small_settings(), lambda: Wrapped(runtime, complete=writing(lambda _: Silent())))
    with served.client() as client, counting(client, cancelled=1):
        hang_up(served, "/v1/steer/completion", {**STEER, "stream": stream}, begun.is_set)


def begin(server: Served, n_bytes: int) -> socket.socket:
    """A request of which the first byte of the body is sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=300)
    head = "POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {n_bytes}\r\n\r\n{{".encode())
    return connection


def test_hanging_up_within_the_body(server: Served, http: httpx.Client) -> None:
    with counting(http, cancelled=1), begin(server, 100):
        pass


def test_a_body_over_the_bound_is_refused(server: Served, http: httpx.Client) -> None:
    with counting(http, refused=1), begin(server, server.settings.max_body_bytes + 1) as connection:
        assert connection.recv(20).startswith(b"HTTP/1.1 413")


# The worker


def n_tokens_of(http: httpx.Client, text: str) -> int:
    """BOS included."""
    return len(http.post("/v1/tokenize", json={"model": MODEL, "text": text, "prepend_bos": True}).json()["tokens"])


def test_tokens_and_steps_of_a_generation(http: httpx.Client) -> None:
    before = values(http)
    outputs = http.post("/v1/steer/completion", json=STEER).json()["outputs"]
    after = values(http)
    n_tokens = [len(output["logprobs"]) for output in outputs]
    n_prompt = n_tokens_of(http, "Once upon a time")
    assert len(n_tokens) == 2
    assert rise(before, after, "generated_tokens_total") == sum(n_tokens)
    assert rise(before, after, "decode_batch_rows_count") == max(n_tokens) - 1, "prefill draws the first"
    assert rise(before, after, "decode_batch_rows_sum") == sum(n_tokens) - 2
    assert rise(before, after, "prompt_tokens_total", "prefill") == 2 * n_prompt
    assert rise(before, after, "padding_tokens_total", "prefill") == 0
    assert rise(before, after, "first_token_seconds_count") == 1
    assert rise(before, after, "jobs_total", "answered") == 1


def test_tokens_of_a_capture(http: httpx.Client) -> None:
    text = f"{TEXT} Nobody has asked about this text."
    before = values(http)
    first = http.post("/v1/activation/single", json={**SINGLE, "prompt": text}).json()
    after = values(http)
    assert rise(before, after, "prompt_tokens_total", "capture") == n_tokens_of(http, text)
    assert rise(before, after, "capture_batch_requests_sum") == 1
    assert rise(before, after, "jobs_total", "answered") == 1
    assert http.post("/v1/activation/single", json={**SINGLE, "prompt": text}).json() == first
    again = values(http)
    assert rise(after, again, "prompt_tokens_total", "capture") == 0, "what was seen is not run again"
    assert rise(after, again, "reuse_hits_total") == 1
    assert 0 < again[("neuronpedia_reuse_bytes",)] <= again[("neuronpedia_reuse_budget_bytes",)]


def test_nothing_is_left_behind(http: httpx.Client) -> None:
    """An answer leaves before the worker has put its rows away."""
    http.post("/v1/steer/completion", json=STEER)
    gauges = ("waiting_jobs", "running_generations", "decoding_rows", "admitted_requests", "sae_leased")
    until(lambda: not any(values(http)[(f"neuronpedia_{name}",)] for name in gauges))
    assert values(http)[("neuronpedia_sae_sources",)] == 3


def test_capabilities_say_the_same(http: httpx.Client) -> None:
    now, told = values(http), http.get("/v1/capabilities").json()
    for outcome in ("answered", "failed", "cancelled", "expired"):
        assert told["requests"][outcome] == now["neuronpedia_jobs_total", outcome]
