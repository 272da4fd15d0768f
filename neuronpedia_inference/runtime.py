"""The loaded service: model, SAEs and scheduler behind one object, the only thing that operations see."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from neuronpedia_inference.demand import Costs
from neuronpedia_inference.domain import (
    ActiveFeatures,
    ChatMessage,
    FeatureActivations,
    FeatureValue,
    Numbers,
    RankedFeatures,
    Ranking,
    Sampling,
    Source,
    Tokens,
    TopFeatures,
    Written,
)
from neuronpedia_inference.engine.completions import Completions
from neuronpedia_inference.engine.points import MLP_POST, PATTERN, Point
from neuronpedia_inference.engine.protocol import ModelInfo, RowSpec
from neuronpedia_inference.engine.tokens import BosRule
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, NotReady, UnknownSource
from neuronpedia_inference.features import FeatureQuestions
from neuronpedia_inference.loading import HostWeights, Loaded, Progress, load, n_threads
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.offers import offered
from neuronpedia_inference.operations.pacing import paced
from neuronpedia_inference.saes.encode import FeatureReader
from neuronpedia_inference.scheduler.admission import Admission, Demand
from neuronpedia_inference.scheduler.events import TicketEvents
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Steps, Ticket, Work
from neuronpedia_inference.scheduler.policy import Limits
from neuronpedia_inference.scheduler.stay import at_the_end
from neuronpedia_inference.scheduler.worker import Worker
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.steering.plan import SteerPlan
from neuronpedia_inference.steering.resolve import SteerResolver, check_index, check_vector

log = logging.getLogger(__name__)

Result = TypeVar("Result")

NEURONS = "neurons"
BATCH_SHARE = 4
"""Each prompt of a batch may have this fraction of TOKEN_LIMIT."""
PASS_TOKENS = {"cpu": 512, "gpu": 4096}
"""Tokens of several requests in one forward pass. On a CPU more gain nothing (docs/experiments.md)."""
QUEUE_SHARE = 4
"""Completions may wait or run up to this many times MAX_ROWS."""


class Runtime:
    """One model and its sources, ready to answer. Coroutines may be awaited from any event loop."""

    def __init__(self, settings: Settings, loaded: Loaded) -> None:
        self.settings = settings
        self.model: ModelInfo = loaded.info
        self._engine = loaded.engine
        self._codec = loaded.codec
        self._store = loaded.store
        self._labels = loaded.labels
        self._questions = FeatureQuestions(loaded.store, loaded.info)
        self._steering = SteerResolver(loaded.engine, loaded.store, self.source)
        self._costs = Costs(loaded.info)
        self.metrics = Metrics()
        bounds = Demand(
            requests=settings.max_concurrent_requests,
            rows=QUEUE_SHARE * settings.max_rows,
            tokens=settings.max_queued_tokens,
            bytes=loaded.request_bytes,
        )
        self._admission = Admission(bounds, self.metrics.refused)
        self._worker = Worker(
            loaded.engine,
            self._limits(loaded.request_bytes),
            n_threads=n_threads(settings),
            max_wait_s=settings.request_timeout_s or None,
            metrics=self.metrics,
        )
        self.metrics.watch(
            waiting=lambda: self._worker.n_waiting,
            running=lambda: self._worker.n_running,
            rows=lambda: self._worker.n_rows,
            inside=lambda: self._admission.inside.requests,
            inside_bytes=lambda: self._admission.inside.bytes,
            peak_bytes=lambda: self._admission.peak_bytes,
            sae=loaded.store.stats,
        )

    def _limits(self, request_bytes: int) -> Limits:
        tokens = PASS_TOKENS["cpu" if self.model.device == "cpu" else "gpu"]
        return Limits(
            max_rows=self.settings.max_rows,
            max_cache_positions=request_bytes // self._costs.slot_position_bytes,
            max_prefill_tokens=tokens,
            max_capture_tokens=tokens,
        )

    @classmethod
    def load(
        cls, settings: Settings, progress: Progress = lambda _: None, *, host: HostWeights | None = None
    ) -> Runtime:
        """Load everything that `host` does not hold and start the worker; blocks. Raises StartupError."""
        started = time.monotonic()
        runtime = cls(settings, load(settings, progress, host))
        log.info("ready", extra={"model": runtime.model.name, "seconds": round(time.monotonic() - started, 2)})
        return runtime

    @staticmethod
    def settle() -> None:
        """For a process that serves from now on: what is loaded stays, and is no garbage collector's business.

        Going over all of it again and again would hold the interpreter for tenths of a second each time.
        """
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self._worker.close()
        self._store.close()

    @property
    def healthy(self) -> bool:
        """False once the device has failed: the process should be replaced."""
        return self._worker.healthy

    # What is served

    @property
    def sources(self) -> tuple[Source, ...]:
        """The SAEs, in directory order."""
        return self._store.sources

    @property
    def source_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source.source_set for source in self.sources))

    def source(self, name: str) -> Source:
        """An SAE by its name, or a layer's neurons by a bare integer. Raises UnknownSource."""
        if name.isascii() and name.isdecimal():
            return self._neurons(name)
        source = next((source for source in self.sources if source.name == name), None)
        if source is None:
            raise UnknownSource.named("source", name[:80], [s.name for s in self.sources])
        return source

    def source_set(self, name: str) -> tuple[Source, ...]:
        """Every source of a set; "neurons" is the set of all layers' neurons. Raises UnknownSource."""
        if name == NEURONS:
            return tuple(self._neurons(str(layer)) for layer in range(self.model.n_layers))
        found = tuple(source for source in self.sources if source.source_set == name)
        if not found:
            raise UnknownSource.named("source set", name[:80], [*self.source_sets, NEURONS])
        return found

    def label(self, source: str, index: int) -> str | None:
        """What a person calls a feature, where someone or something has named it."""
        labels = self._labels.get(source, ())
        return (labels[index] or None) if 0 <= index < len(labels) else None

    # Text

    def tokenize(self, text: str, bos: BosRule, *, limit: int | None = None, batch: bool = False) -> Tokens:
        """`limit` None is TOKEN_LIMIT, a quarter of it with `batch`. Raises InvalidRequest or LimitExceeded."""
        limit = limit or self._token_limit
        if batch:
            return self._codec.tokenize(text, bos, limit=max(1, limit // BATCH_SHARE), suffix=" for batch requests")
        return self._codec.tokenize(text, bos, limit=limit)

    def render_chat(self, messages: Sequence[ChatMessage]) -> tuple[str, Tokens]:
        """The chat as the model reads it, with generation prompt. Raises InvalidRequest or LimitExceeded."""
        return self._codec.render_chat(messages, limit=self._token_limit)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens kept."""
        return self._codec.decode(ids)

    # Features: one result per prompt, in full-prompt coordinates, nothing masked

    async def feature_activations(
        self, prompts: Sequence[Tokens], source: Source, index: int, *, dfa_from: int = 0
    ) -> list[FeatureActivations]:
        """One feature. `dfa_from`: first position that direct feature attribution may explain."""
        check_index(source, index)
        self._check_prompts(prompts, at_least=dfa_from + 1)
        return await self._ask(self._questions.activations(prompts, source, index, dfa_from))

    async def projections(self, prompts: Sequence[Tokens], hook: str, vector: Sequence[float]) -> list[Numbers]:
        """h·v at every position of a hook: [pos] per prompt."""
        point = Point.parse(hook)
        self._engine.check(point)
        check_vector(vector, self._engine.width(point), hook)
        self._check_prompts(prompts)
        return await self._ask(self._questions.projections(prompts, point, vector))

    async def ranked_features(
        self, prompts: Sequence[Tokens], sources: Sequence[Source], ranking: Ranking
    ) -> list[RankedFeatures]:
        """The features that fire most (contract 2.10)."""
        self._check_prompts(prompts, at_least=max(ranking.weights, default=0) + 1)
        return await self._ask(self._questions.ranked(prompts, sources, ranking))

    async def top_features(self, prompts: Sequence[Tokens], source: Source, k: int) -> list[TopFeatures]:
        """The k strongest features at every position."""
        self._check_prompts(prompts)
        return await self._ask(self._questions.top(prompts, source, k))

    async def active_features(
        self, prompts: Sequence[Tokens], source: Source, *, first: int = 0
    ) -> list[ActiveFeatures]:
        """All non-zero activations from position `first` on. Raises LimitExceeded beyond MAX_RESULT_VALUES."""
        self._check_prompts(prompts)
        most = self.settings.max_result_values
        return await self._ask(self._questions.active(prompts, source, first=first, most=most))

    async def encoder_column(self, source: Source, index: int) -> tuple[float, ...]:
        """W_enc[:, index] after folding: [width]."""
        check_index(source, index)

        def column(reader: FeatureReader) -> tuple[float, ...]:
            return tuple(reader.encoder_column(index).tolist())

        return await self._ask(CallWork(lambda: self._questions.read(source, column)))

    async def nearest_decoder_rows(
        self, source: Source, query: Sequence[float] | tuple[Source, int], limit: int
    ) -> list[FeatureValue]:
        """Features of `source` by cosine similarity of their decoder rows to a vector or to another feature's row."""
        if isinstance(query, tuple) and len(query) == 2 and isinstance(query[0], Source):
            return await self._nearest_to_feature(source, query[0], int(query[1]), limit)
        vector = cast(Sequence[float], query)
        check_vector(vector, len(vector), source.name)  # the reader knows the width of its decoder rows

        def nearest(reader: FeatureReader) -> list[FeatureValue]:
            return list(reader.nearest_decoder_rows(torch.tensor(vector), limit))

        return await self._ask(CallWork(lambda: self._questions.read(source, nearest)))

    # Generation

    async def check_steering(self, plan: SteerPlan) -> None:
        """Raises LimitExceeded, InvalidRequest, UnknownSource or UnknownPoint unless the plan can be honoured."""
        await paced(self._steering.checks(plan))

    def generate(
        self, prompt: Tokens, plans: Sequence[SteerPlan | None], sampling: Sampling, *, stream: bool
    ) -> AsyncIterator[tuple[Written, ...]]:
        """One row per plan, all in one batch; None generates unsteered. Plans have passed `check_steering`.

        Checks and admits at once: every 4xx and 503 is raised by the call itself. With `stream` what is new in every
        row, as often as there is something and the reader asks; without, everything at once at the end. Closing the
        iterator frees the rows.
        """
        self._check_room(prompt, sampling)
        steered = [plan for plan in plans if plan is not None]
        work = GenerateWork(
            lambda: self._rows(prompt, plans, sampling),
            n_rows=len(plans),
            n_prompt_tokens=len(prompt),
            n_positions=len(prompt) + sampling.max_new_tokens,
        )
        points = {point for plan in steered for point in self._steering.points(plan)}
        pattern = self._engine.makes_pattern(points)
        demand = self._costs.generation(
            work.n_rows,
            work.n_prompt_tokens,
            sampling.max_new_tokens,
            n_logprobs=sampling.n_logprobs,
            n_numbers=sum(plan.n_numbers for plan in steered),
            pattern=pattern,
        )
        events = TicketEvents(lambda put: self._submit(work, demand, on_event=put), at_the_end=not stream)
        return _Writing(events, Completions(self._codec, len(plans)))

    async def with_model(self, run: Callable[[torch.nn.Module], Result]) -> Result:
        """What `run` makes of Hugging Face's model, on the worker, while nothing else uses it: for those who check."""

        def steps() -> Steps:
            yield None
            return run(self._engine.decoder.model)

        return await self._ask(CallWork(steps))

    def describe(self) -> dict[str, Any]:
        """Model, sources, limits and state, for `/v1/capabilities`."""
        model, settings = self.model, self.settings
        return {
            "model": model.name,
            "model_id": model.id,
            "family": model.family,
            "backend": "eager" if self._engine.graphs_off_because else "cuda_graph",
            "graphs_off_because": self._engine.graphs_off_because or None,
            "device": model.device,
            "dtype": model.dtype,
            "num_layers": model.n_layers,
            "d_model": model.d_model,
            "vocab_size": model.vocab_size,
            "context_length": model.context_length,
            "sae_sets": list(self.source_sets),
            "sources": [source.name for source in self.sources],
            "token_limit": self._token_limit,
            "activation_token_limit": self._token_limit,
            "max_tokens": self._max_tokens,
            "max_num_results": settings.max_results,
            "max_top_k": settings.max_top_k,
            "max_result_values": settings.max_result_values,
            "max_body_bytes": settings.max_body_bytes,
            "max_concurrent_requests": settings.max_concurrent_requests,
            "capture_points": list(self._engine.readable_places()),
            "writes_available": list(self._engine.writable_places()),
            "chat": model.has_chat_template,
            "neurons": MLP_POST in self._engine.readable_places(),
            "dfa": any(source.has_dfa for source in self.sources),
            "sae_cache": self._store.stats(),
            "requests": {"inside": self._admission.inside.requests, **self.metrics.counts()},
            "merges_completions": not self._engine.unmerged_because,
            "unmerged_because": self._engine.unmerged_because or None,
            "max_rows": settings.max_rows,
            "request_memory_bytes": self._admission.bounds.bytes,
            "running": self._worker.n_running,
            "waiting": self._worker.n_waiting,
            **offered(self._engine.verdict, self.sources, chat=model.has_chat_template),
        }

    # Inside

    def _neurons(self, name: str) -> Source:
        layer = int(name[:8])
        if layer >= self.model.n_layers or len(name) > 8 or str(layer) != name:
            raise UnknownSource(
                f"Unknown source {name[:80]!r}: a bare integer names a layer's neurons, "
                f"and the model has layers 0 to {self.model.n_layers - 1}."
            )
        point = Point(layer, MLP_POST)
        self._engine.check(point)
        width = self._engine.width(point)
        return Source(name, NEURONS, layer, point.name, width, width, NEURONS)

    async def _nearest_to_feature(self, source: Source, other: Source, index: int, limit: int) -> list[FeatureValue]:
        check_index(other, index)

        def run() -> Steps:
            row = yield from self._questions.read(other, lambda reader: reader.decoder_row(index))
            return (
                yield from self._questions.read(source, lambda reader: list(reader.nearest_decoder_rows(row, limit)))
            )

        return await self._ask(CallWork(run))

    @property
    def _token_limit(self) -> int:
        return min(self.settings.token_limit, self.model.context_length)

    @property
    def _max_tokens(self) -> int:
        return min(self.settings.max_tokens, self.model.context_length)

    def _check_prompts(self, prompts: Sequence[Tokens], *, at_least: int = 1) -> None:
        """Raises InvalidRequest for a prompt with fewer tokens than the question needs, or with unknown ones."""
        for prompt in prompts:
            if len(prompt) < at_least:
                short = f"has {len(prompt)} tokens, {at_least} needed" if prompt.ids and at_least > 1 else "is empty"
                raise InvalidRequest(f"Prompt {short}.")
            largest = max(prompt.ids)
            if largest >= self.model.vocab_size:
                name = prompt.strings[prompt.ids.index(largest)]
                raise InvalidRequest(
                    f"The model has no embedding for token {name!r} (id {largest}): its last id is "
                    f"{self.model.vocab_size - 1}. The tokenizer knows more than the model; leave this token out."
                )

    def _check_room(self, prompt: Tokens, sampling: Sampling) -> None:
        self._check_prompts([prompt])
        if len(prompt) + sampling.max_new_tokens > self._max_tokens:
            raise LimitExceeded(
                f"No room to generate: the prompt is {len(prompt)} tokens and {sampling.max_new_tokens} are asked for, "
                f"but the per-request budget (prompt + completion) is {self._max_tokens}. "
                "Shorten the prompt, ask for fewer tokens, or start a new conversation."
            )

    def _rows(self, prompt: Tokens, plans: Sequence[SteerPlan | None], sampling: Sampling) -> Steps:
        """-> list[RowSpec]. Runs on the worker."""
        special = tuple(place for place, is_special in enumerate(prompt.is_special) if is_special)
        rows: list[RowSpec] = []
        for plan in plans:
            if plan is None:
                rows.append(RowSpec(prompt.ids, sampling))
            else:
                steering = yield from self._steering.resolve(plan)
                untouched = special if plan.skip_special_tokens else ()
                rows.append(RowSpec(prompt.ids, sampling, steering, untouched))
        return rows

    async def _ask(self, work: CaptureWork | CallWork) -> Any:
        if isinstance(work, CaptureWork):
            for point in sorted(work.points):
                self._engine.check(point)
        demand = self._capture_demand(work) if isinstance(work, CaptureWork) else Demand()
        return await asyncio.wrap_future(self._submit(work, demand).future)

    def _submit(self, work: Work, demand: Demand, *, on_event: Callable[[Any], None] | None = None) -> Ticket:
        permit = self._admission.permit(demand)
        try:
            ticket = self._worker.submit(work, on_event=on_event)
        except NotReady:
            permit.release()
            raise
        at_the_end(ticket.future, permit.release)
        return ticket

    def _capture_demand(self, work: CaptureWork) -> Demand:
        widths = [self._engine.width(point) for point in work.points if point.place != PATTERN]
        return self._costs.capture(
            work.lengths,
            widths,
            work.reduce_bytes,
            pattern=self._engine.makes_pattern(work.points),
            n_patterns=len(work.points) - len(widths),
        )


class _Writing(AsyncIterator[tuple[Written, ...]]):
    """Decode steps as text, on the reader's event loop."""

    def __init__(self, events: TicketEvents, completions: Completions) -> None:
        self._events = events
        self._completions = completions

    async def __anext__(self) -> tuple[Written, ...]:
        return await self._completions.written(await anext(self._events))

    async def rest(self, seconds: float) -> None:
        await self._events.rest(seconds)

    async def aclose(self) -> None:
        await self._events.aclose()
