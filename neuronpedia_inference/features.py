"""Questions about features as capture work: which points to read, and what to make of them beside the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import (
    ActiveFeature,
    Dfa,
    FeatureActivations,
    FeatureValue,
    RankedFeature,
    Ranking,
    Source,
    Tokens,
)
from neuronpedia_inference.engine.points import HOOK_V, PATTERN, Point
from neuronpedia_inference.engine.protocol import Captured, ModelInfo
from neuronpedia_inference.errors import EngineFailed, InvalidRequest
from neuronpedia_inference.saes import reduce
from neuronpedia_inference.saes.encode import FeatureReader, NeuronReader
from neuronpedia_inference.saes.store import SaeStore
from neuronpedia_inference.scheduler.jobs import CaptureWork, Steps


@dataclass(frozen=True)
class FeatureQuestions:
    """Makes capture work; every result has one entry per prompt, in full-prompt coordinates."""

    store: SaeStore
    model: ModelInfo

    def activations(self, prompts: Sequence[Tokens], source: Source, index: int, dfa_from: int) -> CaptureWork:
        """-> list[FeatureActivations]"""

        def one(reader: FeatureReader, seen: Captured) -> FeatureActivations:
            values = reduce.feature_values(reader, seen[_point(source)], index)
            if not source.has_dfa:
                return FeatureActivations(values)
            target = max(range(dfa_from, len(values)), key=values.__getitem__)
            return FeatureActivations(values, self._dfa(reader, seen, source, index, target))

        return self._work(prompts, source, _points([source]), one)

    def projections(self, prompts: Sequence[Tokens], point: Point, vector: Sequence[float]) -> CaptureWork:
        """-> list[tuple[float, ...]]: h·v per position, the vector in the activation's dtype."""

        def one(seen: Captured) -> tuple[float, ...]:
            hidden = seen[point]
            direction = torch.tensor(vector, dtype=hidden.dtype, device=hidden.device)
            values = (hidden @ direction).float()
            if not bool(values.isfinite().all()) and bool(hidden.isfinite().all()):
                raise InvalidRequest(f"The vector is too large: its product with {point.name} is not finite.")
            return _finite(values, point.name)

        def project_all(captured: list[Captured]) -> Steps:
            yield from ()
            return [one(seen) for seen in captured]

        return CaptureWork([prompt.ids for prompt in prompts], {point}, project_all)

    def ranked(self, prompts: Sequence[Tokens], sources: Sequence[Source], ranking: Ranking) -> CaptureWork:
        """-> list[tuple[RankedFeature, ...]], best first. One source is leased at a time."""

        def rank_all(captured: list[Captured]) -> Steps:
            rankers = [reduce.FeatureRanker(ranking) for _ in captured]
            for source in sources:
                with (yield self.request(source)) as reader:
                    for ranker, seen in zip(rankers, captured, strict=True):
                        ranker.add(reader, seen[_point(source)])
            results = [ranker.result() for ranker in rankers]
            for source in sources:
                if source.has_dfa and any(row.source == source.name for rows in results for row in rows):
                    with (yield self.request(source)) as reader:
                        pairs = zip(results, captured, strict=True)
                        results = [self._with_dfa(rows, reader, seen, source) for rows, seen in pairs]
            return results

        return CaptureWork(
            [prompt.ids for prompt in prompts], _points(sources), rank_all, _reduce_bytes(prompts, sources)
        )

    def top(self, prompts: Sequence[Tokens], source: Source, k: int) -> CaptureWork:
        """-> list[tuple[tuple[FeatureValue, ...], ...]]: [prompt][position][k]"""

        def one(reader: FeatureReader, seen: Captured) -> tuple[tuple[FeatureValue, ...], ...]:
            return reduce.top_features(reader, seen[_point(source)], k)

        return self._work(prompts, source, {_point(source)}, one)

    def active(self, prompts: Sequence[Tokens], source: Source) -> CaptureWork:
        """-> list[tuple[ActiveFeature, ...]]: non-zero activations, by position, then feature."""

        def one(reader: FeatureReader, seen: Captured) -> tuple[ActiveFeature, ...]:
            return reduce.active_features(reader, seen[_point(source)])

        return self._work(prompts, source, {_point(source)}, one)

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
        self,
        prompts: Sequence[Tokens],
        source: Source,
        points: set[Point],
        one: Callable[[FeatureReader, Captured], Any],
    ) -> CaptureWork:
        """`one` asked of every prompt."""
        return CaptureWork(
            [prompt.ids for prompt in prompts],
            points,
            lambda captured: self.read(source, lambda reader: [one(reader, seen) for seen in captured]),
            _reduce_bytes(prompts, [source]),
        )

    def _with_dfa(
        self, rows: Sequence[RankedFeature], reader: FeatureReader, seen: Captured, source: Source
    ) -> tuple[RankedFeature, ...]:
        return tuple(
            replace(row, dfa=self._dfa(reader, seen, source, row.index, row.max_value_index))
            if row.source == source.name
            else row
            for row in rows
        )

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


def _reduce_bytes(prompts: Sequence[Tokens], sources: Sequence[Source]) -> int:
    """One prompt and one source are reduced at a time."""
    longest = max(map(len, prompts), default=0)
    return max((reduce.peak_bytes(source, longest) for source in sources), default=0)


def _finite(values: Tensor, where: str) -> tuple[float, ...]:
    """[pos] -> pos floats. Raises EngineFailed: JSON has no NaN, and a caller could not use one."""
    if not bool(values.isfinite().all()):
        raise EngineFailed(f"The model gave a value that is not finite at {where!r}.")
    return tuple(values.tolist())
