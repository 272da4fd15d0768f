"""The loaded service: model, SAEs and scheduler behind one object, the only thing that operations see."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from neuronpedia_inference import reproducible
from neuronpedia_inference.capabilities import describe
from neuronpedia_inference.completion import Begun, Completion
from neuronpedia_inference.costs import NO_GRID, RECORDED_GRID, Costs, Demand
from neuronpedia_inference.domain import ChatMessage, Lens, Numbers, Sampling, Tokens, Written
from neuronpedia_inference.edits.plan import Plan
from neuronpedia_inference.edits.proof import ResolvedEdit, n_numbers
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.engine.completions import Completions, Writing
from neuronpedia_inference.engine.memory import usage
from neuronpedia_inference.engine.protocol import ModelInfo, RowSpec
from neuronpedia_inference.engine.stops import StopStrings
from neuronpedia_inference.errors import BUSY, Busy, InvalidRequest, LimitExceeded, NotReady
from neuronpedia_inference.host_memory import accommodate, give_back
from neuronpedia_inference.kept_vectors import KeptVectors
from neuronpedia_inference.lensing import Lenses, SteerToken
from neuronpedia_inference.loading import HostWeights, Loaded, Progress, load, n_threads
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.persona import persona_of
from neuronpedia_inference.points import PATTERN, Point
from neuronpedia_inference.questions import Question
from neuronpedia_inference.questions.checks import check_prompts
from neuronpedia_inference.resolving.edits import EditResolver
from neuronpedia_inference.resolving.watches import WatchResolver
from neuronpedia_inference.saes.shelf import Shelf
from neuronpedia_inference.scheduler.admission import Admission
from neuronpedia_inference.scheduler.events import TicketEvents
from neuronpedia_inference.scheduler.jobs import CallWork, CaptureWork, GenerateWork, Steps, Ticket, Work
from neuronpedia_inference.scheduler.policy import Limits
from neuronpedia_inference.scheduler.stay import hold, idle
from neuronpedia_inference.scheduler.worker import Worker
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.texts import Texts
from neuronpedia_inference.variants import Variant, read_variants
from neuronpedia_inference.vitals import Load, vitals
from neuronpedia_inference.watches.plan import WatchPlan
from neuronpedia_inference.watches.readings import tracing
from neuronpedia_inference.watches.rules import RulePlan

T = TypeVar("T")

log = logging.getLogger(__name__)

PASS_TOKENS = {"cpu": 512, "gpu": 4096}
"""Tokens of several requests in one forward pass. On a CPU more gain nothing (docs/experiments.md)."""
REUSE_SHARE = 32
"""This fraction of the memory of requests is for what is kept to be used again."""
QUEUE_SHARE = 4
"""Completions may wait or run up to this many times MAX_ROWS."""


class Runtime(Texts):
    """One model and its sources, ready to answer. Coroutines may be awaited from any event loop."""

    def __init__(self, settings: Settings, loaded: Loaded) -> None:
        self.settings = settings
        self.model: ModelInfo = loaded.info
        self._engine = loaded.engine
        self._newcomers = loaded.newcomers
        self._codec = loaded.codec
        self.shelf = Shelf(loaded.store, loaded.engine, loaded.annotations, loaded.newcomers)
        self._edits = EditResolver(loaded.engine, self.shelf, loaded.codec.special_ids)
        self.lenses = Lenses(settings, loaded.engine, loaded.codec, loaded.jacobians)
        self.watches = WatchResolver(loaded.engine, self.shelf, loaded.jacobians, max_top_k=settings.max_top_k)
        self.persona = persona_of(settings, loaded.info)
        self.vectors = KeptVectors(int(settings.kept_vectors_mib * 2**20))
        self.provenance = loaded.provenance
        self.provenance.begin()
        self.variants: Mapping[str, Variant] = read_variants(settings.variants)
        self.started = int(time.time())
        """In seconds since 1970."""
        self._costs = Costs(loaded.info)
        self.metrics = Metrics()
        loaded.engine.recent.budget_bytes = _reuse_bytes(settings, loaded.request_bytes)
        bounds = Demand(
            requests=settings.max_concurrent_requests,
            rows=QUEUE_SHARE * settings.max_rows,
            tokens=settings.max_queued_tokens,
            bytes=loaded.request_bytes,
        )
        kept = NO_GRID if loaded.engine.graphs_off_because else RECORDED_GRID
        self._admission = Admission(bounds, self._costs.position_bytes, kept, self.metrics.refused)
        self._worker = Worker(
            loaded.engine,
            self._limits(),
            n_threads=n_threads(settings),
            max_wait_s=settings.request_timeout_s or None,
            metrics=self.metrics,
            give_back=give_back,
        )
        self._move = accommodate(loaded.engine.decoder.model, PASS_TOKENS["cpu"], self._worker.submit)
        self.metrics.watch(
            waiting=lambda: self._worker.n_waiting,
            running=lambda: self._worker.n_running,
            parked=lambda: self._worker.n_parked,
            rows=lambda: self._worker.n_rows,
            inside=lambda: self._admission.inside.requests,
            inside_bytes=lambda: self._admission.inside.bytes,
            peak_bytes=lambda: self._admission.peak_bytes,
            sae=self.shelf.stats,
            reuse=loaded.engine.recent.stats,
        )

    def _limits(self) -> Limits:
        tokens = PASS_TOKENS["cpu" if self.model.device == "cpu" else "gpu"]
        return Limits(max_rows=self.settings.max_rows, max_prefill_tokens=tokens, max_capture_tokens=tokens)

    @classmethod
    def load(
        cls, settings: Settings, progress: Progress = lambda _: None, *, host: HostWeights | None = None
    ) -> Runtime:
        """Load everything that `host` does not hold and start the worker; blocks. Raises StartupError."""
        started = time.monotonic()
        read_variants(settings.variants)  # what is wrong with the files is said before anything is loaded
        runtime = cls(settings, load(settings, progress, host))
        log.info("ready", extra={"model": runtime.model.name, "seconds": round(time.monotonic() - started, 2)})
        return runtime

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self._move.stop()
        self._newcomers.close()
        self.provenance.close()
        self._worker.close()
        self.shelf.close()

    @property
    def healthy(self) -> bool:
        """False once the device has failed: the process should be replaced."""
        return self._worker.healthy

    # Questions

    def width(self, point: Point) -> int:
        """Of one position's vector there, heads concatenated. Raises UnknownPoint where the model cannot be read."""
        self._engine.check(point)
        return self._engine.width(point)

    async def ask(self, question: Question[T], plan: Plan | None = None, n_generated: Sequence[int] = ()) -> T:
        """The answer, with one entry per prompt where prompts are run.

        plan: what edits them; it has passed `check_steering`. n_generated: of each prompt, tokens at its end to which
        that applies as to what is generated; none where it is left out.

        Raises what the question's `check` raises and UnknownPoint before anything runs, LimitExceeded or Overloaded
        where there is no room, and what its reduction raises.
        """
        question.check(self._engine, self.model.vocab_size)
        points = question.points
        if not points:
            work: Work = CallWork(lambda: question.reduce((), self.shelf))
            return await asyncio.wrap_future(self._submit(work, Demand()).future)
        for point in sorted(points):
            self._engine.check(point)
        await self._weights_at_rest()
        work = CaptureWork(
            [prompt.ids for prompt in question.prompts],
            points,
            lambda captured: question.reduce(captured, self.shelf),
            self._is_reproducible,
            None if plan is None else self._edits.texts(question.prompts, n_generated, plan),
        )
        return await asyncio.wrap_future(self._submit(work, self._demand(question, points, plan)).future)

    # Generation

    async def complete(self, wanted: Completion, *, stream: bool) -> Begun:
        """Checks everything, admits, and begins; with `stream` what is written comes as it is, else all at the end.

        Raises LimitExceeded, InvalidRequest, UnknownSource or UnknownPoint, and Overloaded where there is no room.
        """
        rendered, prompt = await self.checked(wanted)
        watches = None if wanted.reads is None else wanted.reads.watches
        written = self.generate(
            prompt,
            wanted.plans,
            wanted.sampling,
            watches=watches,
            rules=wanted.reads,
            seeds=wanted.seeds,
            proves=wanted.proves,
            ahead=self._ahead(wanted, prompt),
            stream=stream,
        )
        return Begun(
            prompt,
            rendered,
            edited=[self.edited(plan) for plan in wanted.plans],
            written=written,
            resolved=[self._resolved(plan) for plan in wanted.plans],
            is_reproducible=self._is_reproducible,
        )

    async def checked(self, wanted: Completion) -> tuple[str, Tokens]:
        """A chat as its template gives it, and the tokens. Raises as `complete` does for what never can be done."""
        for plan in {id(plan): plan for plan in (wanted.named, *wanted.plans) if plan is not None}.values():
            await self.check_steering(plan)
        rendered, prompt = self._prompt(wanted.prompt)
        if not prompt.ids:
            raise InvalidRequest("Prompt is empty")
        self._check_room(prompt, wanted.plans, wanted.sampling, wanted.reads)
        await self._weights_at_rest()
        return rendered, prompt

    async def check_steering(self, plan: Plan) -> None:
        """Raises LimitExceeded, InvalidRequest, UnknownSource or UnknownPoint unless the plan can be honoured."""
        await paced(self._edits.checks(plan))

    def edited(self, plan: Plan | None) -> set[Point]:
        """Where a checked plan steers."""
        return set() if plan is None else self._edits.written(plan)

    def generate(
        self,
        prompt: Tokens,
        plans: Sequence[Plan | None],
        sampling: Sampling,
        *,
        watches: WatchPlan | None = None,
        rules: RulePlan | None = None,
        seeds: Sequence[int] | None = None,
        proves: bool = False,
        ahead: Demand | None = None,
        stream: bool,
    ) -> AsyncIterator[tuple[Written, ...]]:
        """One row per plan, all in one batch; None generates unsteered. Plans have passed `check_steering`.

        seeds: one per plan, where they differ from the sampling's. What is watched comes with every row, twice where
        that row is steered. `rules` are on what is watched. proves: behind that comes, with every edited row, what its
        edits do (`edits.proof`). ahead: what the request will do next, which has to have room too.

        Checks and admits at once: every 4xx and 503 is raised by the call itself. With `stream` what is new in every
        row, as often as there is something and the reader asks; without, everything at once at the end. Closing the
        iterator frees the rows.
        """
        self._check_room(prompt, plans, sampling, rules)
        n_read = self._n_read(prompt, plans, sampling, watches, proves=proves)
        steered = list(filter(None, plans))
        held = ExitStack()
        samplings = [replace(sampling, seed=seed) for seed in seeds or [sampling.seed] * len(plans)]
        work = GenerateWork(
            lambda: self._rows(prompt, plans, samplings, watches, rules, held, proves=proves),
            n_rows=len(plans),
            n_prompt_tokens=len(prompt),
            n_positions=len(prompt) + sampling.max_new_tokens,
            streams=stream,
            reproducible=self._is_reproducible,
        )
        points = {point for plan in steered for point in self._edits.points(plan)}
        pattern = self._engine.makes_pattern(points)
        demand = self._costs.generation(
            work.n_rows,
            work.n_prompt_tokens,
            sampling.max_new_tokens + (0 if rules is None else rules.n_refused),
            n_logprobs=sampling.n_logprobs,
            n_numbers=(1 + proves) * sum(plan.n_numbers for plan in steered) + work.n_rows * len(sampling.logit_bias),
            n_read=n_read,
            read_whole=() if watches is None else watches.whole,
            n_edits=(1 + proves) * sum(len(plan.edits) for plan in steered),
            reads_out=watches is not None and bool(watches.lenses),
            jacobians=watches is not None and any(read.lens is Lens.JACOBIAN for read in watches.lenses),
            pattern=pattern,
        )
        if ahead is not None:
            demand = demand.at_least(ahead)
        events = TicketEvents(lambda put: self._submit(work, demand, on_event=put, held=held), at_the_end=not stream)
        return Writing(events, Completions(self._codec, len(plans), sampling.stop))

    def keep_room(self, n_bytes: int) -> None:
        """For what the request that we are in keeps until it ends. Raises LimitExceeded, or Overloaded where there is
        no room now."""
        nothing: Future[None] = Future()
        nothing.set_result(None)
        hold(nothing, self._admission.permit(Demand(requests=0, bytes=n_bytes)))

    def n_prompts(self, prompt: Tokens, plans: Sequence[Plan | None]) -> int:
        """How often a prompt is run at the most, for rows of these plans, which begin together."""
        if self._is_reproducible or self._engine.unmerged_because:
            return len(plans)
        return self._edits.n_prompts(plans, prompt.ids)

    async def directions(self, tokens: Sequence[SteerToken], layers: Sequence[int]) -> dict[int, Numbers]:
        """[d_model] by layer: see `Lenses.directions`."""
        await self._weights_at_rest()
        work = CallWork(lambda: self.lenses.directions(tokens, layers))
        return await asyncio.wrap_future(self._submit(work, Demand()).future)

    def check_idle(self) -> None:
        """Raises Busy where one more generation would have to wait."""
        if self._worker.n_waiting or self._worker.n_rows >= self.settings.max_rows:
            raise Busy(BUSY)

    async def with_model(self, run: Callable[[Any], T]) -> T:
        """What `run` makes of Hugging Face's model, on the worker, while nothing else uses it: for those who check."""

        def steps() -> Steps:
            yield None
            return run(self._engine.decoder.model)

        return await asyncio.wrap_future(self._submit(CallWork(steps), Demand()).future)

    async def forget(self) -> None:
        """Let go of what is kept of prompts: what is asked next is computed, as those who check want it."""

        def steps() -> Steps:
            yield None
            self._engine.recent.clear()

        await asyncio.wrap_future(self._submit(CallWork(steps), Demand()).future)

    def describe(self) -> dict[str, Any]:
        """Model, sources, limits and state, for `/v1/capabilities`."""
        load = {
            "requests": {"inside": self._admission.inside.requests, **self.metrics.counts()},
            "request_memory_bytes": self._admission.bounds.bytes,
            "running": self._worker.n_running,
            "waiting": self._worker.n_waiting,
        }
        return describe(self.settings, self.model, self._engine, self.shelf, self.lenses.jacobians, self.persona, load)

    def vitals(self) -> dict[str, Any]:
        """How the server is now, for `/v1/steer/health`; to be asked on an event loop."""
        worker = self._worker
        admitted = self._admission.inside.bytes / self._admission.bounds.bytes
        load = Load(worker.n_running, worker.n_waiting, worker.n_parked, admitted)
        return vitals(self.model.name, load, usage(self._engine.device))

    # Inside

    async def _weights_at_rest(self) -> None:
        """Reproducible work waits for the weights' move: the last bits of a product depend on how they are aligned."""
        if self._is_reproducible:
            await self._move.ended()

    @property
    def _is_reproducible(self) -> bool:
        return reproducible.is_wanted() or self.settings.reproducible

    def _prompt(self, prompt: str | Sequence[ChatMessage] | Tokens) -> tuple[str, Tokens]:
        """A chat as its template gives it, and the tokens. Raises InvalidRequest or LimitExceeded."""
        if isinstance(prompt, Tokens):
            return "", prompt
        return ("", self.tokenize(prompt, "once")) if isinstance(prompt, str) else self.render_chat(prompt)

    def _ahead(self, wanted: Completion, prompt: Tokens) -> Demand | None:
        """Of what is asked once it is written. Raises as `ask` does before anything runs."""
        if wanted.then is None:
            return None
        question = wanted.then(prompt)
        question.check(self._engine, self.model.vocab_size)
        return self._demand(question, question.points, wanted.named)

    def _resolved(self, plan: Plan | None) -> tuple[ResolvedEdit, ...]:
        return () if plan is None else self._edits.resolved(plan)

    def _edits_of(self, plan: Plan | None) -> tuple[set[Point], int]:
        """Where a plan writes, and its number of edits."""
        return self.edited(plan), 0 if plan is None else len(plan.edits)

    def _n_read(
        self,
        prompt: Tokens,
        plans: Sequence[Plan | None],
        sampling: Sampling,
        watches: WatchPlan | None,
        *,
        proves: bool,
    ) -> int:
        """Numbers that reading gives. Raises LimitExceeded where they are too many, or the text is too long for it."""
        if watches is None and not proves:
            return 0
        n_positions = len(prompt) + sampling.max_new_tokens
        self.watches.check(watches, n_positions)
        n_read = 0 if watches is None else sum(watches.n_numbers(*self._edits_of(plan)) for plan in plans)
        n_read += sum(n_numbers(self._resolved(plan)) for plan in plans) if proves else 0
        n_read *= n_positions - (0 if watches is None else watches.read_from)
        most = self.settings.max_result_values
        if n_read > most:
            raise LimitExceeded(
                f"{'watch' if watches is not None else 'receipt'}: up to {n_positions} tokens have {n_read} numbers in "
                f"all, the most in one answer is {most}. Watch less, ask for fewer tokens, or raise MAX_RESULT_VALUES."
            )
        return n_read

    def _rows(
        self,
        prompt: Tokens,
        plans: Sequence[Plan | None],
        samplings: Sequence[Sampling],
        watches: WatchPlan | None,
        rules: RulePlan | None,
        held: ExitStack,
        *,
        proves: bool,
    ) -> Steps:
        """-> list[RowSpec], one per plan, good until `held` is closed. Runs on the worker."""
        rows: list[RowSpec] = []
        resolved: dict[int, tuple[RowEdit, ...]] = {}
        for plan, sampling in zip(plans, samplings, strict=True):
            if plan is not None and id(plan) not in resolved:
                resolved[id(plan)] = yield from self._edits.resolve(plan)
            stops = StopStrings(self._codec, sampling.stop) if sampling.stop else None
            rows.append(RowSpec(prompt.ids, sampling, () if plan is None else resolved[id(plan)], stops=stops))
        if watches is None and not proves:
            return rows
        watches = watches or WatchPlan.of(())
        is_word = self.lenses.words.is_word if any(read.words_only for read in watches.lenses) else None
        read = yield from self.watches.readings(watches, held, is_word)
        weight = self.watches.weight(watches)
        special = frozenset(self._codec.special_ids)
        watched: list[RowSpec] = []
        for row, plan in zip(rows, plans, strict=True):
            points, n_edits = self._edits_of(plan)
            of_row = [
                self._engine.watch(one.point, read[one], before=watches.is_read_before(one, points))
                for one in watches.reads
            ]
            if proves:
                of_row += [
                    self._engine.watch(point, one, before=True, proves=True)
                    for point, one in tracing(row.edits).items()
                ]
            ends = () if rules is None else rules.of_row(watches.places(points, n_edits), special)
            told = {"read_from": watches.read_from, "tells_edits": watches.tells_edits}
            watched.append(replace(row, watches=tuple(of_row), weight=weight, rules=ends, **told))
        return watched

    def _check_room(
        self, prompt: Tokens, plans: Sequence[Plan | None], sampling: Sampling, rules: RulePlan | None
    ) -> None:
        """Also for every edit to act somewhere."""
        n_refused = 0 if rules is None else rules.n_refused
        check_prompts([prompt], self.model.vocab_size)
        most = self.max_tokens
        if len(prompt) + sampling.max_new_tokens > most:
            raise LimitExceeded(
                f"No room to generate: the prompt is {len(prompt)} tokens and {sampling.max_new_tokens} are asked for, "
                f"but the per-request budget (prompt + completion) is {most}. "
                "Shorten the prompt, ask for fewer tokens, or start a new conversation."
            )
        if len(prompt) + sampling.max_new_tokens + n_refused > most:
            raise LimitExceeded(
                f"rules: up to {n_refused} tokens are taken back and drawn anew (back × times of every retry), beside "
                f"{len(prompt)} of the prompt and {sampling.max_new_tokens} new ones, but the per-request budget is "
                f"{most}. Take back fewer or less often, or ask for fewer tokens."
            )
        n_positions = len(prompt) + max(0, sampling.max_new_tokens - 1)
        self._edits.check_selections(plans, prompt.ids, n_prompt=len(prompt), n_positions=n_positions)

    def _submit(
        self,
        work: Work,
        demand: Demand,
        *,
        on_event: Callable[[Any], None] | None = None,
        held: ExitStack | None = None,
    ) -> Ticket:
        """`held` is closed on the worker when the work has ended. What follows it in its request has its room."""
        permit = self._admission.permit(demand, idle())
        try:
            ticket = self._worker.submit(work, on_event=on_event)
        except NotReady:
            permit.release()
            raise
        if held is not None:
            ticket.future.add_done_callback(lambda _: held.close())
        hold(ticket.future, permit)
        return ticket

    def _demand(self, question: Question[Any], points: Collection[Point], plan: Plan | None) -> Demand:
        widths = [self._engine.width(point) for point in points if point.place != PATTERN]
        return self._costs.capture(
            [len(prompt) for prompt in question.prompts],
            widths,
            question.n_bytes,
            pattern=self._engine.makes_pattern(points),
            n_patterns=len(points) - len(widths),
            n_edits=0 if plan is None else len(plan.edits) * len(question.prompts),
            n_numbers=0 if plan is None else plan.n_numbers,
        )


def _reuse_bytes(settings: Settings, request_bytes: int) -> int:
    if settings.reuse_memory_gib is None:
        return min(request_bytes // REUSE_SHARE, 2**30)
    return int(settings.reuse_memory_gib * 2**30)
