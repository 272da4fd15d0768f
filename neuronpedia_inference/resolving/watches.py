"""From watches of plain numbers to readings on the device, refusing what cannot be read before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronpedia_inference.domain import Lens, Source
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.protocol import Reading
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, UnknownPoint
from neuronpedia_inference.lenses.jacobians import Jacobians
from neuronpedia_inference.points import Point
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

    def __init__(self, engine: ModelEngine, shelf: Shelf, jacobians: Jacobians, *, max_top_k: int) -> None:
        self._engine = engine
        self._shelf = shelf
        self._jacobians = jacobians
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

    def lens(self, kind: Lens, layers: Sequence[int] | None, n: int) -> WatchLens:
        """layers: None for all. n is cut to the vocabulary. Raises InvalidRequest, NoJacobianLens or LimitExceeded."""
        available = self.lens_layers(kind, n)
        chosen = available if layers is None else list(dict.fromkeys(layers))
        if not chosen:
            raise InvalidRequest(f"layers: name at least one of {_listed(available)}, or leave it out for all.")
        for layer in chosen:
            if layer not in available:
                raise InvalidRequest(f"layers: {layer} is none of this lens's, which are {_listed(available)}.")
        return self.read_by(kind, chosen, min(n, self._engine.vocab_size))

    def lens_layers(self, kind: Lens, n: int) -> list[int]:
        """Behind which blocks n tokens can be read by it, ascending; the last is always there.

        Raises InvalidRequest, NoJacobianLens or LimitExceeded.
        """
        self._engine.check_lens()
        if n > self._max_top_k:
            raise LimitExceeded(f"top_n is {n}, the most is {self._max_top_k}. Ask for fewer or raise MAX_TOP_K.")
        if kind is Lens.LOGIT:
            return list(range(self._engine.n_layers))
        self._jacobians.check()
        return [*self._jacobians.layers, self._engine.n_layers - 1]

    def read_by(self, kind: Lens, layers: Sequence[int], n: int, *, words_only: bool = False) -> WatchLens:
        """Layers that this lens has. Behind the last block every lens is the model itself, whose likeliest token is
        told before all words."""
        last = self._engine.n_layers - 1
        return WatchLens(
            tuple(
                LensRead(layer, n, Lens.LOGIT if layer == last else kind, words_only, keeps_first=layer == last)
                for layer in layers
            )
        )

    def weight(self, plan: WatchPlan) -> float:
        """What a position costs with all lenses that look at it, in positions of a pass without."""
        width, n_vocab = self._engine.d_model, self._engine.vocab_size
        n_products = sum(width * (n_vocab + width * (read.lens is Lens.JACOBIAN)) for read in plan.lenses)
        return 1.0 + n_products / self._engine.n_products

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
        if source.is_temporal:
            raise InvalidRequest(
                f"Source {name!r} cannot be watched while a text is written: {source.unread_alone_because}, which are "
                "not at hand then. Ask for its activations on the finished text."
            )
        return source

    def _point(self, hook: str) -> Point:
        point = Point.parse(hook)
        self._engine.check(point)
        if point.is_inside_attention:
            raise UnknownPoint(f"{hook!r} cannot be watched: it is read inside attention, where prompts are only read.")
        return point

    # On the worker

    def readings(self, plan: WatchPlan, held: ExitStack, is_word: NDArray[np.bool_] | None = None) -> Steps:
        """-> dict[Read, Reading], good until `held` is closed. is_word: [vocab], where a lens tells only words."""
        handicap = None if is_word is None else _handicap(is_word).to(self._engine.device)
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
                found[read] = self._lens(read, handicap)
            elif read not in found:
                found[read] = _whole(read, readers.get(read.source) or NeuronReader(read.source))
        return found

    def _lens(self, read: LensRead, handicap: Tensor | None) -> Reading:
        return LensReading(
            self._engine.readout,
            self._engine.vocab_size,
            read.n,
            jacobian=self._jacobians.by_layer[read.layer] if read.lens is Lens.JACOBIAN else None,
            handicap=handicap if read.words_only else None,
            keeps_first=read.keeps_first,
        )

    def _columns(self, read: FeaturesRead) -> Steps:
        """-> Reading, with copies of the weights."""
        features: list[FeatureWeights] = []
        for index in read.indices:
            with (yield self._shelf.feature(read.source, index)) as weights:
                features.append(weights)
        return ColumnsReading(features)


def _handicap(is_word: NDArray[np.bool_]) -> Tensor:
    """What leaves out all others where it is added to logits, which takes a fraction of the time of filling in."""
    return torch.from_numpy(np.where(is_word, np.float32(0), np.float32(-np.inf)))


def _listed(layers: Sequence[int]) -> str:
    """Layers, those that follow each other as a span."""
    return f"{layers[0]} to {layers[-1]}" if len(layers) == layers[-1] - layers[0] + 1 else ", ".join(map(str, layers))


def _whole(read: FeaturesRead | TopRead, reader: FeatureReader) -> Reading:
    return TopReading(reader, read.k) if isinstance(read, TopRead) else FeaturesReading(reader, read.indices)
