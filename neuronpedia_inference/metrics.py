"""What the service counts and measures of itself, for `/metrics` and whoever watches a fleet of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from neuronpedia_inference.errors import InferenceError, NotReady, Overloaded

PREFIX = "neuronpedia_"
JOB_OUTCOMES = ("answered", "failed", "cancelled", "expired")
BOUNDS = ("requests", "rows", "tokens", "bytes")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

Kind = Literal["counter", "gauge", "histogram"]
Number = Callable[[], int]
Stats = Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class Described:
    """A metric as the reference lists it."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def family(self) -> Metric:
        """Without a value yet."""
        kinds: Mapping[str, type[Metric]] = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        return kinds[self.kind](self.name, self.meaning)


def _watched(kind: Kind, name: str, meaning: str) -> Described:
    return Described(PREFIX + name, kind, meaning)


# What others count already, read when somebody asks.
LOAD = {
    "waiting": _watched("gauge", "waiting_jobs", "Jobs that wait for their turn."),
    "running": _watched("gauge", "running_generations", "Generations under way."),
    "parked": _watched("gauge", "parked_generations", "Generations that have made way for others, and go on later."),
    "rows": _watched("gauge", "decoding_rows", "Rows that decode together now."),
    "inside": _watched("gauge", "admitted_requests", "Requests that were admitted and have not ended."),
    "inside_bytes": _watched(
        "gauge", "admitted_bytes", "Bytes that they may take at the most, their answers included."
    ),
    "peak_bytes": _watched("gauge", "admitted_bytes_peak", "The most bytes that were admitted at once."),
}
SAES = {
    "sources": _watched("gauge", "sae_sources", "SAEs that are served."),
    "max_loaded": _watched("gauge", "sae_max_loaded", "SAEs that may be on the device at once."),
    "budget_bytes": _watched("gauge", "sae_budget_bytes", "Bytes that SAEs may take on the device, 0 for no bound."),
    "resident": _watched("gauge", "sae_resident", "SAEs on the device now."),
    "resident_bytes": _watched("gauge", "sae_resident_bytes", "Bytes that SAEs take on the device now."),
    "peak_bytes": _watched("gauge", "sae_peak_bytes", "The most bytes that SAEs have taken on the device."),
    "host": _watched("gauge", "sae_host", "SAEs that are kept in the host's memory."),
    "host_budget_bytes": _watched("gauge", "sae_host_budget_bytes", "Bytes that SAEs may take on the host."),
    "host_peak_bytes": _watched("gauge", "sae_host_peak_bytes", "The most bytes that SAEs have taken on the host."),
    "leased": _watched("gauge", "sae_leased", "SAEs in use now, which cannot leave the device."),
    "hits": _watched("counter", "sae_hits_total", "Uses of an SAE that was on the device already."),
    "loads": _watched("counter", "sae_loads_total", "SAEs read from disk."),
    "uploads": _watched("counter", "sae_uploads_total", "SAEs copied from the host's memory to the device."),
    "evictions": _watched("counter", "sae_evictions_total", "SAEs that left the device to make room."),
    "features_read": _watched("counter", "sae_features_read_total", "Single features read from files."),
}


REUSE = {
    "budget_bytes": _watched("gauge", "reuse_budget_bytes", "Bytes that may be kept of recent prompts."),
    "bytes": _watched("gauge", "reuse_bytes", "Bytes that are kept of recent prompts now."),
    "hits": _watched("counter", "reuse_hits_total", "Times that what was kept of a prompt was used again."),
}


class Metrics:
    """Counters and gauges of one runtime, in a registry of its own. Safe from any thread."""

    def __init__(self) -> None:
        self._watches: list[_Watch] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted so far, as after a check at start. Nothing may be under way."""
        self._registry = _Registry()
        self._described: list[Described] = []
        for watch in self._watches:
            self._registry.register(watch)
        self._requests = self._counter(
            "requests_total",
            "Requests by how they ended: answered, refused, overloaded, failed, or cancelled by hanging up.",
            "operation",
            "outcome",
        )
        self._request_seconds = self._histogram(
            "request_seconds", "Seconds that answered requests took, streams to their last event.", SECONDS, "operation"
        )
        self._first_token = self._histogram(
            "first_token_seconds", "Seconds from a generation's submission to its first token.", SECONDS
        )
        self._decode_rows = self._histogram("decode_batch_rows", "Rows that took a decode step together.", SIZES)
        self._prefill_rows = self._histogram("prefill_batch_rows", "Rows that joined in one forward pass.", SIZES)
        self._captures = self._histogram(
            "capture_batch_requests", "Requests that shared a forward pass for activations.", SIZES
        )
        self._generated = self._counter(
            "generated_tokens_total", "New tokens that were told, of all rows; what rules take back is not."
        )
        self._prompt = self._counter(
            "prompt_tokens_total", "Prompt tokens run through the model, by kind of forward pass.", "pass"
        )
        self._padding = self._counter(
            "padding_tokens_total", "Padding run through the model beside them, by kind of forward pass.", "pass"
        )
        self._jobs = self._counter(
            "jobs_total",
            "Jobs by how they ended: answered, failed, cancelled by hanging up, or expired while they waited.",
            "outcome",
        )
        self._refusals = self._counter(
            "admission_refusals_total", "Requests not admitted, by the bound that had no room.", "bound"
        )
        self._start_at_zero()

    # Doors

    def request(self, operation: str, *, left: type[Exception] | tuple[type[Exception], ...] = ()) -> RequestCount:
        """Times one request to an operation from now; `left` are exceptions which say that its caller has gone."""
        return RequestCount(self._requests, self._request_seconds, operation, left)

    # Worker

    def decoded(self, n_rows: int) -> None:
        """One decode step of so many rows."""
        self._decode_rows.observe(n_rows)

    def told(self, n_tokens: int) -> None:
        """So many new tokens are on their way to whoever asked."""
        self._generated.inc(n_tokens)

    def prefilled(self, n_rows: int, n_tokens: int, n_padding: int) -> None:
        """One forward pass over prompts of so many rows; n_tokens without padding."""
        self._prefill_rows.observe(n_rows)
        self._passed("prefill", n_tokens, n_padding)

    def captured(self, n_requests: int, n_tokens: int, n_padding: int) -> None:
        """One forward pass for activations; n_tokens without padding."""
        self._captures.observe(n_requests)
        self._passed("capture", n_tokens, n_padding)

    def first_token(self, seconds: float) -> None:
        """From submission on."""
        self._first_token.observe(seconds)

    def ended(self, outcome: str) -> None:
        """A job left the worker; outcome: one of JOB_OUTCOMES."""
        assert outcome in JOB_OUTCOMES, outcome
        self._jobs.labels(outcome).inc()

    def refused(self, bound: str) -> None:
        """Admission said no; bound: one of BOUNDS."""
        assert bound in BOUNDS, bound
        self._refusals.labels(bound).inc()

    def watch(self, *, sae: Stats, reuse: Stats, **load: Number) -> None:
        """Read these whenever somebody asks: `load` has the keys of LOAD, the others give a number for each key of
        SAES and of REUSE.

        May be called once.
        """
        assert load.keys() == LOAD.keys(), load.keys()
        of_load = _Watch(LOAD, lambda: {key: read() for key, read in load.items()})
        self._watches = [of_load, _Watch(SAES, sae), _Watch(REUSE, reuse)]
        for watch in self._watches:
            self._registry.register(watch)

    # Readers

    def text(self) -> tuple[bytes, str]:
        """Everything in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def counts(self) -> dict[str, int]:
        """Ended jobs by outcome."""
        samples = [sample for metric in self._jobs.collect() for sample in metric.samples]
        totals = {s.labels["outcome"]: int(s.value) for s in samples if s.name.endswith("_total")}
        return {outcome: totals[outcome] for outcome in JOB_OUTCOMES}

    def describe(self) -> list[Described]:
        """Every metric, those that `watch` brings included."""
        return [*self._described, *LOAD.values(), *SAES.values(), *REUSE.values()]

    # Inside

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        self._described.append(Described(PREFIX + name, "counter", meaning, labels))
        return Counter(PREFIX + name, meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        self._described.append(Described(PREFIX + name, "histogram", meaning, labels))
        return Histogram(PREFIX + name, meaning, labels, registry=self._registry, buckets=buckets)

    def _start_at_zero(self) -> None:
        """A series that appears with its first event hides that event from a rate."""
        for outcome in JOB_OUTCOMES:
            self._jobs.labels(outcome)
        for bound in BOUNDS:
            self._refusals.labels(bound)
        for kind in ("prefill", "capture"):
            self._passed(kind, 0, 0)

    def _passed(self, kind: str, n_tokens: int, n_padding: int) -> None:
        self._prompt.labels(kind).inc(n_tokens)
        self._padding.labels(kind).inc(n_padding)


class RequestCount:
    """One request, counted once: by what its block raises, or as cancelled by `abandon`. Only answers are timed."""

    def __init__(
        self,
        requests: Counter,
        seconds: Histogram,
        operation: str,
        left: type[Exception] | tuple[type[Exception], ...],
    ) -> None:
        self._requests = requests
        self._seconds = seconds
        self._operation = operation
        self._left = left
        self._started_s = time.perf_counter()
        self._has_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        """No effect on a request that has ended."""
        self._end(self._outcome_of(exc))

    def abandon(self) -> None:
        """Its caller has gone; no effect on a request that has ended."""
        self._end("cancelled")

    def _outcome_of(self, exc: BaseException | None) -> str:
        if exc is None or isinstance(exc, StopAsyncIteration):
            return "answered"
        if isinstance(exc, self._left) or not isinstance(exc, Exception):
            return "cancelled"
        if isinstance(exc, NotReady | Overloaded):
            return "overloaded"
        return "refused" if isinstance(exc, InferenceError) and exc.status < 500 else "failed"

    def _end(self, outcome: str) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._requests.labels(self._operation, outcome).inc()
        if outcome == "answered":
            self._seconds.labels(self._operation).observe(time.perf_counter() - self._started_s)


class _Registry(CollectorRegistry):
    """Without the second series that the library adds to each, for the time at which it began."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Watch:
    """A collector of numbers that somebody else keeps."""

    def __init__(self, described: Mapping[str, Described], read: Stats) -> None:
        self._described = described
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return [each.family for each in self._described.values()]

    def collect(self) -> Iterable[Metric]:
        now = self._read()
        for key, each in self._described.items():
            metric = each.family
            metric.add_sample(each.name, {}, now[key])
            yield metric
