"""From watches of plain numbers to readings on the device, refusing what cannot be read before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from neuronpedia_inference.domain import Source
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.points import Point
from neuronpedia_inference.engine.protocol import Reading
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, UnknownPoint
from neuronpedia_inference.questions.checks import check_index
from neuronpedia_inference.saes.encode import FeatureReader, NeuronReader
from neuronpedia_inference.saes.feature import FeatureWeights
from neuronpedia_inference.saes.shelf import Shelf
from neuronpedia_inference.saes.together import Together
from neuronpedia_inference.scheduler.jobs import Steps
from neuronpedia_inference.watches.plan import (
    FeaturesRead,
    LensRead,
    Read,
    TopRead,
    VectorRead,
    WatchFeature,
    WatchLens,
    WatchPlan,
)
from neuronpedia_inference.watches.readings import (
    ColumnsReading,
    FeaturesReading,
    LensReading,
    TopReading,
    VectorReading,
)


class WatchResolver:
    """Knows the model's points and the SAEs' weights."""

    def __init__(self, engine: ModelEngine, shelf: Shelf, *, max_top_k: int) -> None:
        self._engine = engine
        self._shelf = shelf
        self._together = Together(shelf.request)
        self._max_top_k = max_top_k

    # What may be watched; no tensors

    def feature(self, source: str, index: int) -> WatchFeature:
        """Raises UnknownSource, UnknownPoint, or InvalidRequest for an index out of range."""
        found = self._source(source)
        check_index(found, index)
        return WatchFeature(found, index)

    def top(self, source: str, k: int) -> TopRead:
        """k is cut to what the source has. Raises UnknownSource, UnknownPoint or LimitExceeded."""
        if k > self._max_top_k:
            raise LimitExceeded(f"top_k is {k}, the most is {self._max_top_k}. Ask for fewer or raise MAX_TOP_K.")
        found = self._source(source)
        return TopRead(found, min(k, found.n_features))

    def vector(self, hook: str) -> VectorRead:
        """Raises UnknownPoint."""
        point = self._point(hook)
        return VectorRead(point, self._engine.width(point))

    def lens(self, layers: Sequence[int] | None, n: int) -> WatchLens:
        """layers: None for all. n is cut to the vocabulary. Raises InvalidRequest or LimitExceeded."""
        self._engine.check_lens()
        if n > self._max_top_k:
            raise LimitExceeded(f"top_n is {n}, the most is {self._max_top_k}. Ask for fewer or raise MAX_TOP_K.")
        chosen = range(self._engine.n_layers) if layers is None else layers
        last = self._engine.n_layers - 1
        if not chosen:
            raise InvalidRequest(f"layers: name at least one of 0 to {last}, or leave it out for all.")
        for layer in chosen:
            if not 0 <= layer <= last:
                raise InvalidRequest(f"layers: {layer} is none of this model's, which are 0 to {last}.")
        n = min(n, self._engine.vocab_size)
        return WatchLens(tuple(LensRead(layer, n) for layer in dict.fromkeys(chosen)))

    def check(self, plan: WatchPlan | None, n_positions: int) -> None:
        """Raises LimitExceeded unless a text that may reach so many positions can be watched so.

        plan: None where only edits are."""
        because = self._engine.unwatched_because(n_positions)
        if because:
            what = "receipt" if plan is None else "watch"
            raise LimitExceeded(f"{what}: {because}. Ask for a shorter text.")
        if plan is not None:
            self._shelf.check_together(plan.held)

    def _source(self, name: str) -> Source:
        source = self._shelf.source(name)
        self._point(source.hook)
        return source

    def _point(self, hook: str) -> Point:
        point = Point.parse(hook)
        self._engine.check(point)
        if point.is_inside_attention:
            raise UnknownPoint(f"{hook!r} cannot be watched: it is read inside attention, where prompts are only read.")
        return point

    # On the worker

    def readings(self, plan: WatchPlan, held: ExitStack) -> Steps:
        """-> dict[Read, Reading], good until `held` is closed."""
        found: dict[Read, Reading] = {}
        for read in plan.reads:
            if isinstance(read, FeaturesRead) and read.source not in plan.whole and not read.source.is_neurons:
                found[read] = yield from self._columns(read)
        # Last: who holds sources waits for nothing else.
        readers: dict[Source, FeatureReader] = yield from self._together.take(plan.held, held)
        for read in plan.reads:
            if isinstance(read, VectorRead):
                found[read] = VectorReading(read.width)
            elif isinstance(read, LensRead):
                found[read] = LensReading(self._engine.readout, self._engine.vocab_size, read.n)
            elif read not in found:
                found[read] = _whole(read, readers.get(read.source) or NeuronReader(read.source))
        return found

    def _columns(self, read: FeaturesRead) -> Steps:
        """-> Reading, with copies of the weights."""
        features: list[FeatureWeights] = []
        for index in read.indices:
            with (yield self._shelf.feature(read.source, index)) as weights:
                features.append(weights)
        return ColumnsReading(features)


def _whole(read: FeaturesRead | TopRead, reader: FeatureReader) -> Reading:
    return TopReading(reader, read.k) if isinstance(read, TopRead) else FeaturesReading(reader, read.indices)
