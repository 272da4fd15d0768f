"""An in-memory stand-in for `Runtime`, and the check that it has the real one's methods.

Its numbers are a fixed formula of token, position and feature, so that every expectation can be written down.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from neuronpedia_inference_client import models
from pydantic.alias_generators import to_pascal

import neuronpedia_inference
from neuronpedia_inference.annotations import Found, SourceAnnotations
from neuronpedia_inference.completion import Begun, Completion
from neuronpedia_inference.domain import (
    ActiveFeatures,
    Attended,
    ChatMessage,
    ContrastedFeature,
    Dfa,
    FeatureActivations,
    FeatureNumbers,
    FeatureValue,
    Likelihood,
    Numbers,
    Part,
    RankedFeatures,
    Ranking,
    RenderedChat,
    Sampling,
    Source,
    TokenEffects,
    TokenLogprob,
    Tokens,
    TopFeatures,
    Written,
)
from neuronpedia_inference.edits.plan import Plan
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, UnknownSource
from neuronpedia_inference.kept_vectors import KeptVectors
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.persona import Persona
from neuronpedia_inference.points import Point
from neuronpedia_inference.questions import (
    Active,
    EncoderColumn,
    NearestRows,
    OneFeature,
    PredictedSimilarity,
    Projection,
    Strongest,
    TopPerToken,
    Weighed,
)
from neuronpedia_inference.questions.contrast import Contrast, Contrasted
from neuronpedia_inference.questions.likelihoods import Likelihoods
from neuronpedia_inference.questions.states import HeadPattern, States
from neuronpedia_inference.questions.together import Together
from neuronpedia_inference.settings import Settings

from .fake_lenses import FakeLenses, FakeWatches, read

BOS = "<s>"
SPECIAL = (BOS, "<|im_start|>", "<|im_end|>")
PIECES = re.compile(r"<[^<>\s]+>| ?[^\s<]+|\s|<")
N_FEATURES = 6
AT_BOS = 900.0


def sae(name: str, layer: int, **changes: Any) -> Source:
    fields = {
        "source_set": name.split("-", 1)[1],
        "layer": layer,
        "hook": f"blocks.{layer}.hook_resid_post",
        "n_features": N_FEATURES,
        "width": 4,
        "architecture": "standard",
    }
    return Source(name=name, **{**fields, **changes})


RES = (sae("1-res", 1), sae("2-res", 2), sae("12-res", 11, hook="blocks.11.hook_resid_post"))
ATT = sae("3-att", 3, hook="blocks.3.attn.hook_z", has_dfa=True)


PERSONA = Persona(1, ("- one ↔️ + other",), ("other",), (None,), False, np.zeros(4), np.ones((1, 4)))


class FakeRuntime:
    """Plain Python; words are tokens."""

    def __init__(
        self,
        *,
        has_bos: bool = True,
        natural_bos: bool = False,
        sources: tuple[Source, ...] = (*RES, ATT),
        completions: Sequence[tuple[Written, ...]] = (),
        template_tail: str = "<|im_start|>assistant\n",
        value: float | None = None,
        persona: Persona | None = PERSONA,
        **settings: Any,
    ) -> None:
        self.settings = Settings(_env_file=None, **settings)  # pyright: ignore[reportCallIssue]  (a private argument)
        self.model = SimpleNamespace(
            id="tiny",
            has_bos=has_bos,
            known_names=("tiny", "org/tiny"),
            n_layers=3,
            n_heads=2,
            vocab_size=100,
            d_model=4,
            name="org/tiny",
            dtype="float32",
            device="cpu",
        )
        self.metrics = Metrics()
        self.vectors = KeptVectors(2**20)
        self.persona = persona
        self.sources = sources
        self.natural_bos = natural_bos
        self.completions = completions
        self.template_tail = template_tail
        self.value = value
        self.shelf = self
        self.vocabulary: list[str] = [BOS]
        self.calls: list[tuple[str, Any]] = []
        self.closed = 0
        self.variants: dict[str, Any] = {}
        self.started = 0
        self.max_tokens = self.settings.max_tokens

    def close(self) -> None:
        """Nothing to stop."""

    @property
    def all_sources(self) -> Sequence[Source]:
        return self.sources

    @property
    def source_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source.source_set for source in self.sources))

    def source(self, name: str) -> Source:
        for source in (*self.sources, *self._neurons()):
            if source.name == name:
                return source
        raise UnknownSource.named("source", name, [source.name for source in self.sources])

    def source_set(self, name: str, wanted: Collection[str] = ()) -> tuple[Source, ...]:
        found = tuple(s for s in (*self.sources, *self._neurons()) if s.source_set == name)
        if not found:
            raise UnknownSource.named("source set", name, self.source_sets)
        return found

    def _neurons(self) -> tuple[Source, ...]:
        return tuple(
            Source(str(layer), "neurons", layer, f"blocks.{layer}.mlp.hook_post", N_FEATURES, N_FEATURES, "neurons")
            for layer in range(2)
        )

    def label(self, source: str, index: int) -> str | None:
        return f"{source} means {index}" if index % 2 == 0 else None

    def annotations(self, source: str) -> SourceAnnotations | None:
        if source != RES[0].name:
            return None
        labels = [self.label(source, index) or "" for index in range(N_FEATURES)]
        column = np.arange(N_FEATURES, dtype=np.float64) / 10
        return SourceAnnotations(labels, column, column * 100, column * 10)

    def search(self, text: str, sources: Sequence[str], limit: int) -> list[Found]:
        self.calls.append(("search", (text, sources, limit)))
        return [Found(sources[0], index, 5.0 - index) for index in range(min(limit, 2))]

    def tokenize(self, text: str, bos: str, *, limit: int | None = None, batch: bool = False) -> Tokens:
        limit = (limit or self.settings.token_limit) // (4 if batch else 1)
        adds = {"once": not text.startswith(BOS), "natural": self.natural_bos, "prepend": True, "never": False}[bos]
        tokens = self._tokens(BOS + text if adds and self.model.has_bos else text)
        if len(tokens) > limit:
            suffix = " for batch requests" if batch else ""
            raise LimitExceeded(f"Text too long: {len(tokens)} tokens, max is {limit}{suffix}")
        return tokens

    def _tokens(self, text: str) -> Tokens:
        strings = tuple(PIECES.findall(text))
        for string in strings:
            if string not in self.vocabulary:
                self.vocabulary.append(string)
        ids = tuple(self.vocabulary.index(string) for string in strings)
        special = tuple(string in SPECIAL for string in strings)
        return Tokens(ids, strings, special, has_bos=self.model.has_bos and ids[:1] == (0,))

    def tokens(self, ids: Sequence[int]) -> Tokens:
        strings = tuple(self.vocabulary[i] for i in ids)
        special = tuple(string in SPECIAL for string in strings)
        return Tokens(tuple(ids), strings, special, has_bos=self.model.has_bos and ids[:1] == [0])

    def render_chat(
        self, messages: Sequence[ChatMessage], *, continues: bool = False, options: Mapping[str, Any] | None = None
    ) -> tuple[str, Tokens]:
        self.calls.append(("render_chat", list(messages)))
        text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages) + self.template_tail
        return text, self._tokens(text)

    def template_names(self, name: str) -> bool:
        return False

    async def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        *,
        generation_prompt: bool,
        options: Mapping[str, Any],
        limit: int = 0,
    ) -> RenderedChat:
        self.calls.append(("apply_chat_template", (list(messages), generation_prompt, options)))
        text, tokens = self.render_chat(messages)
        parts = (Part(0, "header"), *[Part(None, "header")] * (len(tokens) - 1))
        return RenderedChat(text, tokens, parts)

    @property
    def lenses(self) -> FakeLenses:
        return FakeLenses(lambda text: self.tokenize(text, "once"), self.apply_chat_template, self.vocabulary)

    @property
    def watches(self) -> FakeWatches:
        return FakeWatches()

    def vitals(self) -> dict[str, Any]:
        whole = dict.fromkeys(("num_running_requests", "num_waiting_requests", "num_swapped_requests"), 1)
        shares = dict.fromkeys(("gpu_cache_usage_percent", "cpu_cache_usage_percent", "system_ram_percent"), 2.5)
        sizes = dict.fromkeys(("system_ram_used_mb", "system_ram_total_mb", "process_ram_mb"), 100.0)
        rest = {"gpu_stats": None, "active_threads": 1, "thread_names": ["t"], "pending_tasks": 1}
        return {**whole, **shares, **sizes, **rest, "timestamp": 1.0, "engine_initialized": True, "model_name": "tiny"}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)

    def at(self, tokens: Tokens, position: int, feature: int) -> float:
        """The one formula: huge on a leading BOS, else small and different everywhere, sometimes zero."""
        if self.value is not None:
            return self.value
        if position == 0 and tokens.has_bos:
            return AT_BOS + feature
        return (position * 7 + feature * 5) % 12 / 4

    def column(self, tokens: Tokens, feature: int) -> tuple[float, ...]:
        return tuple(self.at(tokens, position, feature) for position in range(len(tokens)))

    def width(self, point: Point) -> int:
        return 4

    async def ask(self, question: Any, plan: Plan | None = None, n_generated: Sequence[int] = ()) -> Any:
        if isinstance(question, Together):
            return [self._answered(one) for one in question.questions]
        return self._answered(question)

    def _answered(self, question: Any) -> Any:
        match question:
            case OneFeature():
                return self.feature_activations(
                    question.prompts, question.source, question.index, dfa_from=question.dfa_from
                )
            case Projection():
                return self.projections(question.prompts, question.hook, question.vector)
            case Strongest():
                return self.ranked_features(question.prompts, question.sources, question.ranking)
            case TopPerToken():
                return self.top_features(question.prompts, question.source, question.k)
            case Active():
                return [self._active(tokens, question.first) for tokens in question.prompts]
            case EncoderColumn():
                return tuple(float(question.index + place) for place in range(question.source.width))
            case NearestRows():
                query = question.feature or question.vector
                self.calls.append(("nearest_decoder_rows", (question.source.name, query, question.limit)))
                return [FeatureValue(index, 1.0 - index / 10) for index in range(question.limit)]
            case Weighed():
                row = np.arange(question.source.width, dtype=np.float32)
                effects = TokenEffects((FeatureValue(0, 2.5),), (FeatureValue(0, -1.5),))
                return FeatureNumbers(row, row + 1, 0.5, None, (FeatureValue(1, 0.9),), effects)
            case Contrast():
                self.calls.append(("contrast", question))
                first = ContrastedFeature(question.sources[0].name, 0, 2.0, 3.0, 1.0, 1.0, 0.5, None)
                return Contrasted([[first, replace(first, index=1)]], [[replace(first, effect_size=-2.0)]], 3)
            case _:
                return self._inside(question)

    def _inside(self, question: Any) -> Any:
        """What passes inside the model."""
        match question:
            case Likelihoods():
                return [_likelihood(len(text) - n, question.n_top) for text, n in question.scored]
            case PredictedSimilarity():
                return np.eye(len(question.prompt))
            case HeadPattern():
                ones = np.arange(len(question.prompt))
                return Attended(ones, ones, 1 / (1 + ones), 0.5)
            case States():
                column = np.arange(4, dtype=np.float32)
                return [{point: np.array([column + point.layer]) for point in question.at} for _ in question.prompts]
        raise AssertionError(question)

    def feature_activations(
        self, prompts: Sequence[Tokens], source: Source, index: int, *, dfa_from: int = 0
    ) -> list[FeatureActivations]:
        self.calls.append(("feature_activations", (source.name, index, dfa_from)))
        if not 0 <= index < source.n_features:
            raise InvalidRequest(f"index {index} is out of range: {source.name} has {source.n_features} features")
        return [self._feature(tokens, source, index, dfa_from) for tokens in prompts]

    def _feature(self, tokens: Tokens, source: Source, index: int, dfa_from: int) -> FeatureActivations:
        values = self.column(tokens, index)
        if not source.has_dfa or len(values) <= dfa_from:
            return FeatureActivations(np.array(values))
        target = max(range(dfa_from, len(values)), key=lambda place: (values[place], -place))
        shares = [50.0 if place == 0 else place / 10 for place in range(len(values))]
        return FeatureActivations(np.array(values), Dfa(np.array(shares), target))

    def projections(self, prompts: Sequence[Tokens], hook: str, vector: Any) -> list[Numbers]:
        self.calls.append(("projections", (hook, tuple(vector))))
        return [np.array(self.column(tokens, 0)) for tokens in prompts]

    def ranked_features(
        self, prompts: Sequence[Tokens], sources: Sequence[Source], ranking: Ranking
    ) -> list[RankedFeatures]:
        self.calls.append(("ranked_features", ([source.name for source in sources], ranking)))
        return [self._ranked(tokens, sources, ranking) for tokens in prompts]

    def _ranked(self, tokens: Tokens, sources: Sequence[Source], ranking: Ranking) -> RankedFeatures:
        rows = []
        for number, source in enumerate(sources):
            for index in range(source.n_features):
                found = self._feature(tokens, source, index, 0)
                values: list[float] = found.values.tolist()
                if ranking.ignore_first:
                    values[0] = 0.0
                total = sum(times * values[place] for place, times in ranking.weights.items())
                rows.append((number, index, values, values.index(max(values)), total, found.dfa))
        rows.sort(key=lambda row: -(row[4] if ranking.weights else max(row[2])))
        columns = list(zip(*rows[: ranking.limit], strict=True))
        dfa = {row: dfa for row, dfa in enumerate(columns[5]) if dfa is not None}
        names = tuple(source.name for source in sources)
        numbers, indices, rows_of_values, largest, sums = (np.array(column) for column in columns[:5])
        return RankedFeatures(names, numbers, indices, rows_of_values, largest, sums, dfa)

    def top_features(self, prompts: Sequence[Tokens], source: Source, k: int) -> list[TopFeatures]:
        self.calls.append(("top_features", (source.name, k)))
        return [self._top(tokens, k) for tokens in prompts]

    def _top(self, tokens: Tokens, k: int) -> TopFeatures:
        values = np.array([[self.at(tokens, place, i) for i in range(N_FEATURES)] for place in range(len(tokens))])
        indices = np.argsort(-values, axis=1, kind="stable")[:, :k]
        return TopFeatures(indices, np.take_along_axis(values, indices, axis=1))

    def _active(self, tokens: Tokens, first: int) -> ActiveFeatures:
        found: dict[int, list[tuple[int, float]]] = {}
        for place in range(first, len(tokens)):
            for index in range(N_FEATURES):
                if self.at(tokens, place, index):
                    found.setdefault(index, []).append((place, self.at(tokens, place, index) + 0.00049))
        ends = np.cumsum([len(entries) for entries in found.values()], dtype=int)
        starts = np.concatenate(([0], ends[:-1])).astype(int)
        places, values = zip(*(pair for entries in found.values() for pair in entries), strict=True)
        return ActiveFeatures(np.array(list(found)), starts, ends, np.array(places), np.array(values))

    async def checked(self, wanted: Completion) -> tuple[str, Tokens]:
        rendered, prompt = "", wanted.prompt
        if isinstance(prompt, str):
            prompt = self.tokenize(prompt, "once")
        elif not isinstance(prompt, Tokens):
            rendered, prompt = self.render_chat(prompt)
        if not prompt.ids:
            raise InvalidRequest("Prompt is empty")
        return rendered, prompt

    def n_prompts(self, prompt: Tokens, plans: Sequence[Plan | None]) -> int:
        return len(plans)

    def keep_room(self, n_bytes: int) -> None:
        assert n_bytes > 0

    async def complete(self, wanted: Completion, *, stream: bool) -> Begun:
        rendered, prompt = await self.checked(wanted)
        if wanted.reads is not None and wanted.reads.watches.lenses:
            return Begun(prompt, rendered, [set()], Steps(self, read(prompt, wanted.reads.watches)))
        written = self._generate(prompt, wanted.plans, wanted.sampling, stream=stream)
        nothing: list[Any] = [() for _ in wanted.plans]
        return Begun(prompt, rendered, [set() for _ in wanted.plans], written, resolved=nothing)

    def token_string(self, token_id: int) -> str:
        return self.vocabulary[token_id]

    def _generate(
        self,
        prompt: Tokens,
        plans: Sequence[Plan | None],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        stream: bool,
    ) -> AsyncIterator[tuple[Written, ...]]:
        self.calls.append(("generate", (prompt, list(plans), sampling, stream)))
        if sampling.max_new_tokens > self.settings.max_tokens:
            raise LimitExceeded("No room to generate")
        steps = list(self.completions) or [tuple(_said(plan, sampling) for plan in plans)]
        return Steps(self, steps if stream else [_at_once(steps)])

    def describe(self) -> dict[str, Any]:
        return {"model": self.model.id}

    def called(self, name: str) -> Any:
        """Arguments of the only call of a method."""
        [arguments] = [arguments for called, arguments in self.calls if called == name]
        return arguments


class Steps(AsyncIterator[tuple[Written, ...]]):
    """The given tuples; counts how often it was closed."""

    def __init__(self, runtime: FakeRuntime, steps: Sequence[tuple[Written, ...]]) -> None:
        self.runtime = runtime
        self.steps = list(steps)

    async def __anext__(self) -> tuple[Written, ...]:
        if not self.steps:
            raise StopAsyncIteration
        return self.steps.pop(0)

    async def aclose(self) -> None:
        self.runtime.closed += 1


def _likelihood(n: int, n_top: int) -> Likelihood:
    ranks = np.tile(np.arange(n_top), (n, 1))
    return Likelihood(-np.arange(n, dtype=np.float32), np.ones(n, dtype=bool), ranks, -ranks - 0.5)


def _said(plan: Plan | None, sampling: Sampling) -> Written:
    text = " plain" if plan is None else " steered"
    top = tuple((f"t{i}", -1.0 - i if i else float("-inf")) for i in range(sampling.n_logprobs))
    logprobs = (TokenLogprob(text, -0.5, top),) if top else ()
    return Written(text=text, token_ids=(1,), logprobs=logprobs, finish_reason="length", tokens=(text,))


def _at_once(steps: Sequence[tuple[Written, ...]]) -> tuple[Written, ...]:
    """All that was written, row by row."""
    return tuple(
        Written(
            "".join(one.text for one in row),
            tuple(i for one in row for i in one.token_ids),
            tuple(p for one in row for p in one.logprobs),
            row[-1].finish_reason,
            ending="".join(one.ending for one in row),
            tokens=tuple(token for one in row for token in one.tokens),
        )
        for row in zip(*steps, strict=True)
    )


def ask(name: str, body: dict[str, Any], runtime: Any = None) -> dict[str, Any]:
    """The answer of an operation by name."""
    fake: Any = FakeRuntime()
    return asyncio.run(answer(by_name[name], body, runtime or fake))


def client_reads(name: str, body: dict[str, Any]) -> Any:
    """The answer of a wire operation as the published client's own model; it raises if it cannot read it."""
    model = getattr(models, to_pascal(name) + "Post200Response")
    answered = model.from_dict(body)
    assert answered is not None
    return answered


def test_the_stand_in_has_every_method_of_the_real_runtime():
    """Read from the source text, because importing it would import torch."""
    package = Path(neuronpedia_inference.__file__).parent
    compared = 0
    for file, name in (("runtime.py", "Runtime"), ("texts.py", "Texts"), ("saes/shelf.py", "Shelf")):
        text = (package / file).read_text(encoding="utf-8")
        [real] = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name]
        for method in real.body:
            if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) or method.name.startswith("_"):
                continue
            fake = getattr(FakeRuntime, method.name, None)
            if fake is None or isinstance(fake, property):
                continue
            wanted = [a.arg for a in (*method.args.args, *method.args.kwonlyargs)]
            assert list(inspect.signature(fake).parameters) == wanted, method.name
            assert inspect.iscoroutinefunction(fake) == isinstance(method, ast.AsyncFunctionDef), method.name
            compared += 1
    assert compared >= 10
