"""Questions about features as capture work: which points to read, and what to make of them beside the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from neuronpedia_inference.scheduler.jobs import CaptureWork


@dataclass(frozen=True)
class FeatureQuestions:
    """Makes capture work; every result has one entry per prompt, in full-prompt coordinates."""

    store: SaeStore
    model: ModelInfo

    def activations(self, prompts: Sequence[Tokens], source: Source, index: int, dfa_from: int) -> CaptureWork:
        """-> list[FeatureActivations]"""

        def one(seen: Captured) -> FeatureActivations:
            with self.reader(source) as reader:
                values = reduce.feature_values(reader, seen[_point(source)], index)
                if not source.has_dfa:
                    return FeatureActivations(values)
                target = max(range(dfa_from, len(values)), key=values.__getitem__)
                return FeatureActivations(values, self._dfa(reader, seen, source, index, target))

        return _work(prompts, _points([source]), one)

    def projections(self, prompts: Sequence[Tokens], point: Point, vector: Sequence[float]) -> CaptureWork:
        """-> list[tuple[float, ...]]: h·v per position, the vector in the activation's dtype."""

        def one(seen: Captured) -> tuple[float, ...]:
            hidden = seen[point]
            direction = torch.tensor(vector, dtype=hidden.dtype, device=hidden.device)
            values = (hidden @ direction).float()
            if not bool(values.isfinite().all()) and bool(hidden.isfinite().all()):
                raise InvalidRequest(f"The vector is too large: its product with {point.name} is not finite.")
            return _finite(values, point.name)

        return _work(prompts, {point}, one)

    def ranked(self, prompts: Sequence[Tokens], sources: Sequence[Source], ranking: Ranking) -> CaptureWork:
        """-> list[tuple[RankedFeature, ...]], best first. One source is leased at a time."""

        def reduce_all(captured: list[Captured]) -> list[tuple[RankedFeature, ...]]:
            rankers = [reduce.FeatureRanker(ranking) for _ in captured]
            for source in sources:
                with self.reader(source) as reader:
                    for ranker, seen in zip(rankers, captured, strict=True):
                        ranker.add(reader, seen[_point(source)])
            results = zip(rankers, captured, strict=True)
            return [tuple(self._with_dfa(row, seen, sources) for row in r.result()) for r, seen in results]

        return CaptureWork([prompt.ids for prompt in prompts], _points(sources), reduce_all)

    def top(self, prompts: Sequence[Tokens], source: Source, k: int) -> CaptureWork:
        """-> list[tuple[tuple[FeatureValue, ...], ...]]: [prompt][position][k]"""

        def one(seen: Captured) -> tuple[tuple[FeatureValue, ...], ...]:
            with self.reader(source) as reader:
                return reduce.top_features(reader, seen[_point(source)], k)

        return _work(prompts, {_point(source)}, one)

    def active(self, prompts: Sequence[Tokens], source: Source) -> CaptureWork:
        """-> list[tuple[ActiveFeature, ...]]: non-zero activations, by position, then feature."""

        def one(seen: Captured) -> tuple[ActiveFeature, ...]:
            with self.reader(source) as reader:
                return reduce.active_features(reader, seen[_point(source)])

        return _work(prompts, {_point(source)}, one)

    def reader(self, source: Source) -> AbstractContextManager[FeatureReader]:
        """The right to use a source's weights now."""
        return nullcontext(NeuronReader(source)) if source.is_neurons else self.store.lease(source.name)

    def _with_dfa(self, row: RankedFeature, seen: Captured, sources: Sequence[Source]) -> RankedFeature:
        source = next(source for source in sources if source.name == row.source)
        if not source.has_dfa:
            return row
        with self.reader(source) as reader:
            return replace(row, dfa=self._dfa(reader, seen, source, row.index, row.max_value_index))

    def _dfa(self, reader: FeatureReader, seen: Captured, source: Source, index: int, target: int) -> Dfa:
        values = seen[Point(source.layer, HOOK_V)]
        heads = values.view(len(values), self.model.n_key_value_heads, -1)
        return reduce.dfa(seen[Point(source.layer, PATTERN)], heads, reader.encoder_column(index), target)


def _work(prompts: Sequence[Tokens], points: set[Point], one: Callable[[Captured], Any]) -> CaptureWork:
    return CaptureWork([prompt.ids for prompt in prompts], points, lambda captured: [one(seen) for seen in captured])


def _point(source: Source) -> Point:
    return Point.parse(source.hook)


def _points(sources: Sequence[Source]) -> set[Point]:
    """What the sources read, and what their attributions need."""
    points = {_point(source) for source in sources}
    for source in sources:
        if source.has_dfa:
            points |= {Point(source.layer, PATTERN), Point(source.layer, HOOK_V)}
    return points


def _finite(values: Tensor, where: str) -> tuple[float, ...]:
    """[pos] -> pos floats. Raises EngineFailed: JSON has no NaN, and a caller could not use one."""
    if not bool(values.isfinite().all()):
        raise EngineFailed(f"The model gave a value that is not finite at {where!r}.")
    return tuple(values.tolist())
