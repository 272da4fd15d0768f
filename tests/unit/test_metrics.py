"""Metrics: what is counted, once and under which name; read back by the parser that Prometheus' library has."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from neuronpedia_inference.domain import Written
from neuronpedia_inference.errors import (
    BodyTooLarge,
    EngineFailed,
    InvalidRequest,
    NotReady,
    OutOfMemory,
    Overloaded,
    UnknownSource,
)
from neuronpedia_inference.metrics import LOAD, REUSE, SAES, Metrics
from neuronpedia_inference.operations import (
    OPERATIONS,
    InvalidBody,
    answer,
    answer_events,
    answer_pieces,
    by_name,
    rendering,
)

from .test_operations_core import BODIES
from .test_operations_fake import FakeRuntime

STEER = BODIES["steer_completion"]
TEXTS = tuple((Written(text=text, token_ids=(1,)),) * 2 for text in (" a", "b", "c"))
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(metrics: Metrics) -> Series:
    """Every value of the text, by name and labels."""
    families = text_string_to_metric_families(metrics.text()[0].decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return series(metrics)["neuronpedia_" + name, tuple(sorted(labels.items()))]


def requests(metrics: Metrics) -> dict[tuple[str, str], float]:
    """By operation and outcome."""
    found = {}
    for (name, labels), count in series(metrics).items():
        if name == "neuronpedia_requests_total":
            found[dict(labels)["operation"], dict(labels)["outcome"]] = count
    return found


def quiet(metrics: Metrics, sae: Mapping[str, int] | None = None) -> None:
    stats = sae or dict.fromkeys(SAES, 0)
    metrics.watch(sae=lambda: stats, reuse=lambda: dict.fromkeys(REUSE, 0), **dict.fromkeys(LOAD, lambda: 0))


# Requests


class Gone(Exception):
    pass


@pytest.mark.parametrize(
    ("exc", "outcome"),
    [
        (None, "answered"),
        (InvalidRequest("no"), "refused"),
        (UnknownSource("no"), "refused"),
        (InvalidBody("no", []), "refused"),
        (BodyTooLarge("no"), "refused"),
        (Overloaded("full"), "overloaded"),
        (NotReady("stopping"), "overloaded"),
        (OutOfMemory("full"), "failed"),
        (EngineFailed("broken"), "failed"),
        (RuntimeError("broken"), "failed"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (Gone(), "cancelled"),
    ],
)
def test_a_request_is_counted_by_how_it_ends(exc: BaseException | None, outcome: str) -> None:
    metrics = Metrics()
    count = metrics.request("tokenize", left=Gone)
    with count:
        assert requests(metrics) == {}, "it has not ended"
        count.__exit__(type(exc) if exc else None, exc, None)
    count.abandon()
    assert requests(metrics) == {("tokenize", outcome): 1}, "once, however often it is told"
    timed = ("neuronpedia_request_seconds_count", (("operation", "tokenize"),)) in series(metrics)
    assert timed == (outcome == "answered"), "what is refused at once must not make the service look fast"


def test_what_a_block_raises_is_passed_on() -> None:
    with pytest.raises(Overloaded), Metrics().request("tokenize"):
        raise Overloaded("full")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_counts_its_answers(operation: Any) -> None:
    runtime: Any = FakeRuntime()
    no_object: Any = []
    asyncio.run(answer(operation, BODIES[operation.name], runtime))
    with pytest.raises(InvalidBody):
        asyncio.run(answer(operation, no_object, runtime))
    assert requests(runtime.metrics) == {(operation.name, "answered"): 1, (operation.name, "refused"): 1}


def test_a_caller_that_leaves_cancels() -> None:
    async def leave(runtime: Any) -> None:
        task = asyncio.create_task(answer(by_name["activation_single"], BODIES["activation_single"], runtime))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    runtime: Any = FakeRuntime()

    async def never(*_: Any, **__: Any) -> None:
        await asyncio.sleep(3600)

    runtime.ask = never
    asyncio.run(leave(runtime))
    assert requests(runtime.metrics) == {("activation_single", "cancelled"): 1}


async def stream(runtime: Any, body: dict[str, Any], *, until: int | None = None) -> int:
    """Number of events read; `until`: hang up after so many."""
    events = await answer_events(by_name["steer_completion"], body, runtime)
    n_events = 0
    while until is None or n_events < until:
        assert requests(runtime.metrics) == {}, "a stream has not ended before its last event"
        try:
            await anext(events)
        except StopAsyncIteration:
            break
        n_events += 1
    await events.aclose()
    return n_events


@pytest.mark.parametrize(("until", "outcome"), [(None, "answered"), (2, "cancelled"), (0, "cancelled")])
def test_a_stream_counts_when_it_is_over(until: int | None, outcome: str) -> None:
    runtime: Any = FakeRuntime(completions=TEXTS)
    assert asyncio.run(stream(runtime, STEER, until=until)) == (3 if until is None else until)
    assert requests(runtime.metrics) == {("steer_completion", outcome): 1}
    assert runtime.closed == 1


@pytest.mark.parametrize(("until", "outcome"), [(None, "answered"), (2, "cancelled"), (0, "cancelled")])
def test_an_answer_in_pieces_counts_when_its_last_was_taken(
    until: int | None, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "PIECE_BYTES", 1)
    runtime: Any = FakeRuntime()

    async def take() -> None:
        pieces = await answer_pieces(by_name["tokenize"], BODIES["tokenize"], runtime)
        n_pieces = 0
        while until is None or n_pieces < until:
            assert requests(runtime.metrics) == {}
            try:
                await anext(pieces)
            except StopAsyncIteration:
                assert n_pieces > 2
                break
            n_pieces += 1
        await pieces.aclose()

    asyncio.run(take())
    assert requests(runtime.metrics) == {("tokenize", outcome): 1}


@pytest.mark.parametrize(
    ("exc", "outcome"),
    [(EngineFailed("broken"), "failed"), (RuntimeError("x"), "failed"), (Overloaded("full"), "overloaded")],
)
def test_a_stream_that_fails_midway(exc: Exception, outcome: str) -> None:
    async def failing() -> AsyncIterator[Any]:
        yield TEXTS[0]
        raise exc

    runtime: Any = FakeRuntime()
    runtime._generate = lambda *_, **__: failing()
    with pytest.raises(type(exc)):
        asyncio.run(stream(runtime, STEER))
    assert requests(runtime.metrics) == {("steer_completion", outcome): 1}


@pytest.mark.parametrize(
    ("name", "body"),
    [("steer_completion", {}), ("steer_completion", {**STEER, "features": None}), ("tokenize", BODIES["tokenize"])],
)
def test_a_stream_that_is_refused(name: str, body: dict[str, Any]) -> None:
    runtime: Any = FakeRuntime()
    with pytest.raises(InvalidRequest):
        asyncio.run(answer_events(by_name[name], body, runtime))
    assert requests(runtime.metrics) == {(name, "refused"): 1}


# Worker


def test_rows_and_tokens_add_up() -> None:
    metrics = Metrics()
    metrics.prefilled(3, 30, 6)
    steps = [3, 3, 2, 2, 1]
    for n_rows in steps:
        metrics.decoded(n_rows)
        metrics.told(n_rows - 1)
    metrics.captured(4, 70, 10)
    metrics.captured(1, 9, 0)
    assert value(metrics, "generated_tokens_total") == sum(steps) - len(steps)
    assert value(metrics, "decode_batch_rows_count") == len(steps)
    assert value(metrics, "decode_batch_rows_sum") == sum(steps)
    assert value(metrics, "decode_batch_rows_bucket", le="2.0") == 3
    assert value(metrics, "capture_batch_requests_sum") == 5
    assert [value(metrics, "prompt_tokens_total", **{"pass": kind}) for kind in ("prefill", "capture")] == [30, 79]
    assert [value(metrics, "padding_tokens_total", **{"pass": kind}) for kind in ("prefill", "capture")] == [6, 10]


def test_first_tokens() -> None:
    metrics = Metrics()
    for seconds in (0.02, 0.3, 400.0):
        metrics.first_token(seconds)
    assert value(metrics, "first_token_seconds_count") == 3
    assert value(metrics, "first_token_seconds_sum") == pytest.approx(400.32)
    assert value(metrics, "first_token_seconds_bucket", le="120.0") == 2


def test_jobs_and_refusals() -> None:
    metrics = Metrics()
    assert metrics.counts() == {"answered": 0, "failed": 0, "cancelled": 0, "expired": 0}
    assert value(metrics, "jobs_total", outcome="expired") == 0, "there before the first one"
    for outcome in ("answered", "answered", "cancelled", "expired"):
        metrics.ended(outcome)
    for bound in ("rows", "bytes", "rows"):
        metrics.refused(bound)
    assert metrics.counts() == {"answered": 2, "failed": 0, "cancelled": 1, "expired": 1}
    for outcome, n_jobs in metrics.counts().items():
        assert value(metrics, "jobs_total", outcome=outcome) == n_jobs
    assert value(metrics, "admission_refusals_total", bound="rows") == 2
    assert value(metrics, "admission_refusals_total", bound="tokens") == 0


@pytest.mark.parametrize("call", [lambda m: m.ended("lost"), lambda m: m.refused("mood")])
def test_labels_are_from_a_fixed_list(call: Any) -> None:
    with pytest.raises(AssertionError):
        call(Metrics())


def test_threads_lose_nothing() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(2000):
            metrics.told(2)
            metrics.ended("answered")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "generated_tokens_total") == 6 * 2000 * 2
    assert metrics.counts()["answered"] == 6 * 2000


# What others keep


def test_watched_numbers_are_read_when_somebody_asks() -> None:
    metrics, now = Metrics(), {"waiting": 3, "running": 2, "parked": 1, "rows": 5}
    now |= {"inside": 6, "inside_bytes": 7, "peak_bytes": 8}
    sae = {key: place for place, key in enumerate(SAES)}
    metrics.watch(
        **{key: lambda key=key: now[key] for key in now}, sae=lambda: sae, reuse=lambda: dict.fromkeys(REUSE, 0)
    )
    names = {"waiting": "waiting_jobs", "running": "running_generations", "rows": "decoding_rows"}
    assert {key: value(metrics, name) for key, name in names.items()} == {"waiting": 3, "running": 2, "rows": 5}
    assert value(metrics, "admitted_requests") == 6
    assert (value(metrics, "admitted_bytes"), value(metrics, "admitted_bytes_peak")) == (7, 8)
    assert value(metrics, "sae_resident_bytes") == sae["resident_bytes"]
    assert value(metrics, "sae_evictions_total") == sae["evictions"]
    now["rows"], sae["evictions"] = 0, 99
    assert value(metrics, "decoding_rows") == 0
    assert value(metrics, "sae_evictions_total") == 99


# The text


def test_everything_exposed_is_described_and_the_other_way_round() -> None:
    metrics = Metrics()
    quiet(metrics)
    with metrics.request("tokenize"):
        pass
    families = list(text_string_to_metric_families(metrics.text()[0].decode()))
    exposed = {(f.name + ("_total" if f.type == "counter" else ""), f.type, f.documentation) for f in families}
    described = metrics.describe()
    assert exposed == {(each.name, each.kind, each.meaning) for each in described}
    labels = {f.name: {key for sample in f.samples for key in sample.labels} - {"le"} for f in families}
    assert labels == {each.name.removesuffix("_total"): set(each.labels) for each in described}


@pytest.mark.parametrize("each", Metrics().describe(), ids=lambda each: each.name)
def test_names_and_words(each: Any) -> None:
    assert re.fullmatch(r"neuronpedia_[a-z_]+", each.name)
    assert each.name.endswith("_total") == (each.kind == "counter")
    assert re.fullmatch(r"[A-Z][^.]*\.", each.meaning), "one sentence"
    for word, unit in (("Seconds", "_seconds"), ("bytes", "_bytes")):
        assert (word.lower() in each.meaning.lower()) == (unit in each.name)


def test_the_text_is_for_prometheus() -> None:
    metrics = Metrics()
    metrics.decoded(1)
    text, content_type = metrics.text()
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"_created" not in text


def test_runtimes_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.told(7)
    assert value(other, "generated_tokens_total") == 0
    assert not [family for family in REGISTRY.collect() if family.name.startswith("neuronpedia")]


def test_what_was_counted_can_be_forgotten() -> None:
    """Everything is as if it had just been made, watched numbers included."""
    metrics, fresh = Metrics(), Metrics()
    for one in (metrics, fresh):
        quiet(one)
    with metrics.request("steer"):
        metrics.decoded(3)
    metrics.ended("answered")
    metrics.first_token(0.2)
    assert series(metrics) != series(fresh)
    metrics.reset()
    assert series(metrics) == series(fresh)
    assert metrics.describe() == fresh.describe()
    metrics.ended("answered")
    assert metrics.counts()["answered"] == 1
