"""Questions about features as capture work: which points to read, and what to make of them beside the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from neuronpedia_inference.domain import (
    ActiveFeatures,
    Dfa,
    FeatureActivations,
    Numbers,
    RankedFeatures,
    Ranking,
    Source,
    Tokens,
    TopFeatures,
)
from neuronpedia_inference.engine.points import HOOK_V, PATTERN, Point
from neuronpedia_inference.engine.protocol import Captured, ModelInfo
from neuronpedia_inference.errors import EngineFailed, InvalidRequest, LimitExceeded
from neuronpedia_inference.saes import reduce
from neuronpedia_inference.saes.encode import FeatureReader, NeuronReader
from neuronpedia_inference.saes.store import SaeStore
from neuronpedia_inference.scheduler.jobs import CaptureWork, Steps

Question = Callable[[FeatureReader, Captured], reduce.Pauses[Any]]
"""What is asked of one prompt."""

TOP_BYTES, RANKED_BYTES, ACTIVE_BYTES = 64, 40, 48
"""Of a value in an answer, while it is found, merged and kept."""
SENDING_BYTES = 2**18
"""Of the pieces of an answer that are on their way."""


@dataclass(frozen=True)
class FeatureQuestions:
    """Makes capture work; every result has one entry per prompt, in full-prompt coordinates."""

    store: SaeStore
    model: ModelInfo

    def activations(self, prompts: Sequence[Tokens], source: Source, index: int, dfa_from: int) -> CaptureWork:
        """-> list[FeatureActivations]"""

        def one(reader: FeatureReader, seen: Captured) -> reduce.Pauses[FeatureActivations]:
            values = reduce.feature_values(reader, seen[_point(source)], index)
            yield
            if not source.has_dfa:
                return FeatureActivations(values)
            target = dfa_from + int(values[dfa_from:].argmax())
            return FeatureActivations(values, self._dfa(reader, seen, source, index, target))

        return self._work(prompts, source, _points([source]), one)

    def projections(self, prompts: Sequence[Tokens], point: Point, vector: Sequence[float]) -> CaptureWork:
        """-> list[[pos]]: h·v per position, the vector in the activation's dtype."""

        def one(seen: Captured) -> Numbers:
            hidden = seen[point]
            direction = torch.tensor(vector, dtype=hidden.dtype, device=hidden.device)
            values = (hidden @ direction).float()
            if not bool(values.isfinite().all()):
                if bool(hidden.isfinite().all()):
                    raise InvalidRequest(f"The vector is too large: its product with {point.name} is not finite.")
                raise EngineFailed(f"The model gave a value that is not finite at {point.name!r}.")
            return reduce.on_host(values)

        def project_all(captured: list[Captured]) -> Steps:
            yield None
            return [one(seen) for seen in captured]

        return CaptureWork([prompt.ids for prompt in prompts], {point}, project_all)

    def ranked(self, prompts: Sequence[Tokens], sources: Sequence[Source], ranking: Ranking) -> CaptureWork:
        """-> list[RankedFeatures], best first. One source is leased at a time."""

        def rank_all(captured: list[Captured]) -> Steps:
            rankers = [reduce.FeatureRanker(ranking) for _ in captured]
            for source in sources:
                with (yield self.request(source)) as reader:
                    for ranker, seen in zip(rankers, captured, strict=True):
                        yield from ranker.add(reader, seen[_point(source)])
            results = [ranker.result() for ranker in rankers]
            yield None
            dfas: list[dict[int, Dfa]] = [{} for _ in results]
            for source in sources:
                places = [_rows_of(source, ranked) if source.has_dfa else [] for ranked in results]
                if any(places):
                    with (yield self.request(source)) as reader:
                        for ranked, rows, seen, found in zip(results, places, captured, dfas, strict=True):
                            for row in rows:
                                best = ranked[row]
                                found[row] = self._dfa(reader, seen, source, best.index, best.max_value_index)
                                yield None
            return [replace(ranked, dfa=found) for ranked, found in zip(results, dfas, strict=True)]

        kept = RANKED_BYTES * ranking.limit * sum(map(len, prompts))
        return CaptureWork(
            [prompt.ids for prompt in prompts], _points(sources), rank_all, _reduce_bytes(prompts, sources) + kept
        )

    def top(self, prompts: Sequence[Tokens], source: Source, k: int) -> CaptureWork:
        """-> list[TopFeatures]"""

        def one(reader: FeatureReader, seen: Captured) -> reduce.Pauses[TopFeatures]:
            return reduce.top_features(reader, seen[_point(source)], k)

        return self._work(prompts, source, {_point(source)}, one, TOP_BYTES * k * sum(map(len, prompts)))

    def active(self, prompts: Sequence[Tokens], source: Source, *, first: int, most: int) -> CaptureWork:
        """-> list[ActiveFeatures] from position `first` on. Raises LimitExceeded if they are more than `most`."""

        def one(reader: FeatureReader, seen: Captured) -> reduce.Pauses[tuple[int, ActiveFeatures | None]]:
            return reduce.active_features(reader, seen[_point(source)], first=first, most=most)

        def all_of(captured: list[Captured]) -> Steps:
            found = yield from self._each(source, one, captured)
            n_all = sum(n_found for n_found, _ in found)
            if n_all > most:
                raise LimitExceeded(
                    f"{n_all} activations of {source.name} are not zero, the most in one answer is {most}. "
                    "Send shorter or fewer prompts, or raise MAX_RESULT_VALUES."
                )
            return [active for _, active in found]

        n_values = min(most, source.n_features * max(map(len, prompts), default=0)) * len(prompts)
        taken = _reduce_bytes(prompts, [source]) + ACTIVE_BYTES * n_values
        return CaptureWork([prompt.ids for prompt in prompts], {_point(source)}, all_of, taken)

    def read(self, source: Source, question: Callable[[FeatureReader], Any]) -> Steps:
        """What `question` makes of a source's weights."""
        with (yield self.request(source)) as reader:
            return question(reader)

    def request(self, source: Source) -> Future[Any]:
        """The right to use a source's weights, as soon as they are there: a lease."""
        if not source.is_neurons:
            return self.store.request(source.name)
        free: Future[Any] = Future()
        free.set_result(_Free(NeuronReader(source)))
        return free

    def _work(
        self, prompts: Sequence[Tokens], source: Source, points: set[Point], one: Question, result_bytes: int = 0
    ) -> CaptureWork:
        """`one` asked of every prompt."""
        return CaptureWork(
            [prompt.ids for prompt in prompts],
            points,
            lambda captured: self._each(source, one, captured),
            _reduce_bytes(prompts, [source]) + result_bytes,
        )

    def _each(self, source: Source, one: Question, captured: Sequence[Captured]) -> Steps:
        with (yield self.request(source)) as reader:
            found = []
            for seen in captured:
                found.append((yield from one(reader, seen)))
            return found

    def _dfa(self, reader: FeatureReader, seen: Captured, source: Source, index: int, target: int) -> Dfa:
        values = seen[Point(source.layer, HOOK_V)]
        heads = values.view(len(values), self.model.n_key_value_heads, -1)
        return reduce.dfa(seen[Point(source.layer, PATTERN)], heads, reader.encoder_column(index), target)


@dataclass(frozen=True)
class _Free:
    """In place of a lease where there is nothing to keep."""

    reader: FeatureReader

    def __enter__(self) -> FeatureReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Nothing was taken."""


def _point(source: Source) -> Point:
    return Point.parse(source.hook)


def _points(sources: Sequence[Source]) -> set[Point]:
    """What the sources read, and what their attributions need."""
    points = {_point(source) for source in sources}
    for source in sources:
        if source.has_dfa:
            points |= {Point(source.layer, PATTERN), Point(source.layer, HOOK_V)}
    return points


def _rows_of(source: Source, ranked: RankedFeatures) -> list[int]:
    """Where the source's features stand in the ranking."""
    number = ranked.sources.index(source.name)
    return [row for row, one in enumerate(ranked.source_numbers.tolist()) if one == number]


def _reduce_bytes(prompts: Sequence[Tokens], sources: Sequence[Source]) -> int:
    """One prompt and one source are reduced at a time."""
    longest = max(map(len, prompts), default=0)
    return SENDING_BYTES + max((reduce.peak_bytes(source, longest) for source in sources), default=0)
