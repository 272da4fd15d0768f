"""A few numbers of every position, from what passes at a point: `engine.protocol.Reading`s."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuronpedia_inference.costs import BLOCK_ELEMENTS, LOGITS_AT_ONCE, READ_OUT_AT_ONCE
from neuronpedia_inference.edits.gauges import GaugeTable, norms, unit
from neuronpedia_inference.edits.rows import Gauge, RowEdit
from neuronpedia_inference.engine.sampling import LEAST_LOGPROB
from neuronpedia_inference.points import Point
from neuronpedia_inference.saes.encode import FeatureReader
from neuronpedia_inference.saes.feature import Columns, FeatureWeights, normalised
from neuronpedia_inference.saes.order import any_topk, merge_topk, stable_topk


@dataclass(frozen=True, eq=False)
class VectorReading:
    """What passes, whole."""

    n_numbers: int

    @property
    def key(self) -> Hashable:
        return ("vector", self.n_numbers)

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden.float()


class ColumnsReading:
    """Features of one source that do not depend on others, with copies of their weights."""

    def __init__(self, features: Sequence[FeatureWeights]) -> None:
        first = features[0]
        self.n_numbers = len(features)
        self.key: Hashable = ("columns", first.source.name, tuple(one.index for one in features))
        self._like = first
        self._columns = Columns(
            torch.stack([one.encoder for one in features], dim=1),
            torch.stack([one.bias for one in features]),
            *(_stacked([getattr(one, name) for one in features]) for name in ("threshold", "r_mag", "b_mag")),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        inputs = normalised(hidden.to(self._like.encoder.device, self._like.encoder.dtype), self._like.normalisation)
        if self._like.b_dec is not None:
            inputs = inputs - self._like.b_dec
        return self._columns(inputs).float()


class FeaturesReading:
    """Features of a source whose features depend on each other, or of a layer's neurons. The weights must stay."""

    def __init__(self, reader: FeatureReader, indices: Sequence[int]) -> None:
        self.n_numbers = len(indices)
        self.key: Hashable = ("features", reader.source.name, tuple(indices))
        self._reader = reader
        self._indices = tuple(indices)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._reader.encode_features(hidden, self._indices)


class TopReading:
    """The k strongest features of a source: their indices, exact in float32 below 2²⁴, and their activations."""

    def __init__(self, reader: FeatureReader, k: int) -> None:
        self.n_numbers = 2 * k
        self.key: Hashable = ("top", reader.source.name, k)
        self._reader = reader
        self._k = k

    def __call__(self, hidden: Tensor) -> Tensor:
        best: tuple[Tensor, ...] | None = None
        for first, acts in self._reader.blocks(hidden, max(256, BLOCK_ELEMENTS // len(hidden))):
            values, indices = stable_topk(acts, min(self._k, acts.shape[1]))
            found = (values, indices + first)
            best = found if best is None else merge_topk(best, found, self._k)
            del acts  # or two blocks would be held while the next is made
        assert best is not None, self._reader.source
        return torch.cat([best[1].float(), best[0]], dim=1)


class LensReading:
    """The likeliest tokens by a lens: their ids, exact in float32 below 2²⁴, and their log-probabilities among all.

    What is chosen of several equal ones follows from their row alone.
    """

    def __init__(
        self,
        readout: Callable[[Tensor], Tensor],
        vocab_size: int,
        n: int,
        *,
        jacobian: Tensor | None = None,
        handicap: Tensor | None = None,
        keeps_first: bool = False,
    ) -> None:
        """`readout`: [pos, d_model] -> logits [pos, vocab], float32, a tensor of its own. jacobian: [d_model, d_model],
        applied before it. handicap: [vocab], float32: 0, or -inf of a token that is left out. keeps_first: the
        likeliest token comes first, left out or not."""
        self.n_numbers = 2 * n
        self.key: Hashable = ("lens", n, jacobian is not None, handicap is not None, keeps_first)
        self._readout = readout
        self._jacobian = jacobian
        self._handicap = handicap
        self._keeps_first = keeps_first
        self._at_once = max(1, READ_OUT_AT_ONCE // vocab_size)
        self._n = n

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._jacobian is not None:
            hidden = (hidden.float() @ self._jacobian.float().T).to(hidden.dtype)
        n_pieces = -(-len(hidden) // self._at_once)
        return torch.cat([self._likeliest(self._readout(piece)) for piece in hidden.tensor_split(n_pieces)])

    def _likeliest(self, logits: Tensor) -> Tensor:
        total = _log_totals(logits)
        largest, first = logits.max(-1, keepdim=True) if self._keeps_first else (None, None)
        if self._handicap is not None:
            logits = logits.add_(self._handicap)
        if first is not None:
            logits = logits.scatter_(-1, first, torch.inf)
        values, ids = any_topk(logits, self._n)
        if largest is not None:
            values = torch.cat([largest, values[:, 1:]], dim=-1)
        logprobs = (values - total).clamp(min=LEAST_LOGPROB)
        return torch.cat([ids.float(), logprobs], dim=1)


def _log_totals(logits: Tensor) -> Tensor:
    """[pos, vocab] -> [pos, 1], the logarithm of the sum of their exponentials.

    `logsumexp` takes twice as long, and what it makes on the way is fetched from memory again and again.
    """
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    behind = [part.log_softmax(-1).amax(-1, keepdim=True) for part in logits.split(at_once)]
    return logits.amax(-1, keepdim=True) - torch.cat(behind)


class EditsReading:
    """What edits of one row do at the place where they write: the numbers of `edits.proof`, on one side of them."""

    def __init__(self, edits: Sequence[RowEdit]) -> None:
        along = [Gauge(column) for column in _directions(edits)]
        read = [edit.feature.gauge for edit in edits if edit.feature is not None and edit.feature.elsewhere is None]
        self.n_numbers = 1 + len(along) + len(read)
        self.key: Hashable = ("edits", self)
        self._table = GaugeTable.of([[*along, *read]])

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.cat([norms(hidden), self._table(hidden[None])[0]], dim=1)


def tracing(edits: Sequence[RowEdit]) -> dict[Point, EditsReading]:
    """Of one row, at every place where it is edited, in the order of `edits.proof.by_place`."""
    places: dict[Point, list[RowEdit]] = {}
    for edit in edits:
        places.setdefault(edit.point, []).append(edit)
    return {point: EditsReading(some) for point, some in places.items()}


def _directions(edits: Sequence[RowEdit]) -> Tensor:
    """[edit, width]: vectors by their length; zeros, which have no direction, stay."""
    vectors = torch.stack([edit.vector.float() for edit in edits])
    return torch.where(norms(vectors) > 0, unit(vectors), vectors)


def _stacked(numbers: Sequence[Tensor | None]) -> Tensor | None:
    """[] of every feature -> [feature]; None where these features have none."""
    there = [number for number in numbers if number is not None]
    return torch.stack(there) if there else None
