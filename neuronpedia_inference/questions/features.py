"""Questions about what features do on prompts.

The reductions are imported where they run, on the worker: whoever only makes or checks a question has no need of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from neuronpedia_inference.costs import ACTIVE_BYTES, RANKED_BYTES, TOP_BYTES, reduce_bytes
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
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.points import HOOK_V, PATTERN, Point
from neuronpedia_inference.questions.checks import check_index, check_prompts, check_vector
from neuronpedia_inference.questions.question import Places, Weights

if TYPE_CHECKING:
    from neuronpedia_inference.saes.encode import FeatureReader
    from neuronpedia_inference.saes.feature import OneReader

PREDICTED_BYTES = 12
"""Of what is predicted of a feature at a position: itself, its unit length, and one for the work."""

T = TypeVar("T")
Steps = Generator[Future[Any] | None, Any, T]
"""As `scheduler.jobs.Steps`, with what they return."""


@dataclass(frozen=True)
class OneFeature:
    """One feature at every position; for attention features also where its peak came from."""

    prompts: Sequence[Tokens]
    source: Source
    index: int
    dfa_from: int = 0
    """First position that direct feature attribution may explain; a prompt that ends before has none."""

    @property
    def points(self) -> set[Point]:
        return _points([self.source])

    @property
    def n_bytes(self) -> int:
        return reduce_bytes(self.prompts, [self.source])

    def check(self, places: Places, vocab_size: int) -> None:
        check_index(self.source, self.index)
        check_prompts(self.prompts, vocab_size)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[FeatureActivations]]:
        is_read_alone = self.source.is_read_by_column and not self.source.is_neurons
        asked = weights.feature(self.source, self.index) if is_read_alone else weights.request(self.source)
        return (yield from _each(asked, self._one, captured))

    def _one(self, reader: OneReader, seen: Captured) -> Steps[FeatureActivations]:
        from neuronpedia_inference.saes import reduce

        values = reduce.feature_values(reader, seen[_point(self.source)], self.index)
        yield None
        if not self.source.has_dfa or len(values) <= self.dfa_from:
            return FeatureActivations(values)
        target = self.dfa_from + int(values[self.dfa_from :].argmax())
        return FeatureActivations(values, _dfa(reader, seen, self.index, target))


@dataclass(frozen=True)
class Projection:
    """h·v at every position of a hook: [pos] per prompt."""

    prompts: Sequence[Tokens]
    hook: str
    vector: Sequence[float] | Numbers

    @property
    def points(self) -> set[Point]:
        return {Point.parse(self.hook)}

    @property
    def n_bytes(self) -> int:
        return 0

    def check(self, places: Places, vocab_size: int) -> None:
        point = Point.parse(self.hook)
        places.check(point)
        check_vector(self.vector, places.width(point), self.hook)
        check_prompts(self.prompts, vocab_size)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[Numbers]]:
        from neuronpedia_inference.saes import reduce

        yield None
        point = Point.parse(self.hook)
        return [reduce.projections(seen[point], self.vector, point.name) for seen in captured]


@dataclass(frozen=True)
class PredictedSimilarity:
    """How alike a temporal SAE's predictions for two tokens are: cosines [pos, pos] (contract 4.4)."""

    prompt: Tokens
    source: Source

    @property
    def prompts(self) -> Sequence[Tokens]:
        return (self.prompt,)

    @property
    def points(self) -> set[Point]:
        return {_point(self.source)}

    @property
    def n_bytes(self) -> int:
        n = len(self.prompt)
        return reduce_bytes(self.prompts, [self.source]) + PREDICTED_BYTES * n * self.source.n_features + 8 * n * n

    def check(self, places: Places, vocab_size: int) -> None:
        check_prompts(self.prompts, vocab_size)
        if not self.source.is_temporal:
            raise InvalidRequest(
                f"SAE architecture is not temporal: {self.source.name!r} is of the kind {self.source.architecture}, "
                "which predicts nothing. Name a temporal SAE's source."
            )

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[Numbers]:
        from neuronpedia_inference.saes import reduce

        [seen] = captured
        with (yield weights.request(self.source)) as reader:
            return reduce.predicted_similarity(reader, seen[_point(self.source)])


@dataclass(frozen=True)
class Strongest:
    """The features that fire most (contract 2.10), best first. One source is leased at a time."""

    prompts: Sequence[Tokens]
    sources: Sequence[Source]
    ranking: Ranking

    @property
    def points(self) -> set[Point]:
        return _points(self.sources)

    @property
    def n_bytes(self) -> int:
        kept = RANKED_BYTES * self.ranking.limit * sum(map(len, self.prompts))
        return reduce_bytes(self.prompts, self.sources) + kept

    def check(self, places: Places, vocab_size: int) -> None:
        check_prompts(self.prompts, vocab_size, at_least=max(self.ranking.weights, default=0) + 1)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[RankedFeatures]]:
        from neuronpedia_inference.saes import reduce

        rankers = [reduce.FeatureRanker(self.ranking) for _ in captured]
        for source in self.sources:
            with (yield weights.request(source)) as reader:
                for ranker, seen in zip(rankers, captured, strict=True):
                    yield from ranker.add(reader, seen[_point(source)])
        ranked = [ranker.result() for ranker in rankers]
        yield None
        dfas = yield from self._attributions(ranked, captured, weights)
        return [replace(one, dfa=found) for one, found in zip(ranked, dfas, strict=True)]

    def _attributions(
        self, ranked: Sequence[RankedFeatures], captured: Sequence[Captured], weights: Weights
    ) -> Steps[list[dict[int, Dfa]]]:
        """Of the winners, by their row, where their source has any."""
        dfas: list[dict[int, Dfa]] = [{} for _ in ranked]
        for source in self.sources:
            places = [_rows_of(source, one) if source.has_dfa else [] for one in ranked]
            if not any(places):
                continue
            with (yield weights.request(source)) as reader:
                for one, rows, seen, found in zip(ranked, places, captured, dfas, strict=True):
                    for row in rows:
                        found[row] = _dfa(reader, seen, one[row].index, one[row].max_value_index)
                        yield None
        return dfas


@dataclass(frozen=True)
class TopPerToken:
    """The k strongest features at every position; `scales` [feature] multiply what ranks them."""

    prompts: Sequence[Tokens]
    source: Source
    k: int
    scales: Numbers | None = None

    @property
    def points(self) -> set[Point]:
        return {_point(self.source)}

    @property
    def n_bytes(self) -> int:
        return reduce_bytes(self.prompts, [self.source]) + TOP_BYTES * self.k * sum(map(len, self.prompts))

    def check(self, places: Places, vocab_size: int) -> None:
        check_prompts(self.prompts, vocab_size)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[TopFeatures]]:
        from neuronpedia_inference.saes import reduce

        def one(reader: FeatureReader, seen: Captured) -> Steps[TopFeatures]:
            return reduce.top_features(reader, seen[_point(self.source)], self.k, self.scales)

        return (yield from _each(weights.request(self.source), one, captured))


@dataclass(frozen=True)
class Active:
    """All activations that are not zero, from position `first` on. More than `most` are refused, by LimitExceeded."""

    prompts: Sequence[Tokens]
    source: Source
    most: int
    first: int = 0

    @property
    def points(self) -> set[Point]:
        return {_point(self.source)}

    @property
    def n_bytes(self) -> int:
        n_values = min(self.most, self.source.n_features * max(map(len, self.prompts), default=0)) * len(self.prompts)
        return reduce_bytes(self.prompts, [self.source]) + ACTIVE_BYTES * n_values

    def check(self, places: Places, vocab_size: int) -> None:
        check_prompts(self.prompts, vocab_size)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[ActiveFeatures]]:
        from neuronpedia_inference.saes import reduce

        def one(reader: FeatureReader, seen: Captured) -> Steps[tuple[int, ActiveFeatures | None]]:
            return reduce.active_features(reader, seen[_point(self.source)], first=self.first, most=self.most)

        found = yield from _each(weights.request(self.source), one, captured)
        n_all = sum(n_found for n_found, _ in found)
        if n_all > self.most:
            raise LimitExceeded(
                f"{n_all} activations of {self.source.name} are not zero, the most in one answer is {self.most}. "
                "Send shorter or fewer prompts, or raise MAX_RESULT_VALUES."
            )
        return [active for _, active in found if active is not None]


def _each(asked: Future[Any], one: Callable[[Any, Captured], Steps[T]], captured: Sequence[Captured]) -> Steps[list[T]]:
    """`one` asked of every prompt. asked: a lease, whose block has what `one` is given."""
    with (yield asked) as reader:
        found: list[T] = []
        for seen in captured:
            found.append((yield from one(reader, seen)))
        return found


def _dfa(reader: OneReader, seen: Captured, index: int, target: int) -> Dfa:
    from neuronpedia_inference.saes import reduce

    layer = reader.source.layer
    pattern, values, column = seen[Point(layer, PATTERN)], seen[Point(layer, HOOK_V)], reader.encoder_column(index)
    n_value_heads = values.shape[1] * len(pattern) // column.numel()  # of the width that each head gives
    return reduce.dfa(pattern, values.view(len(values), n_value_heads, -1), column, target)


def _point(source: Source) -> Point:
    return _parsed(source.hook)


@lru_cache(maxsize=1024)
def _parsed(hook: str) -> Point:
    return Point.parse(hook)


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
