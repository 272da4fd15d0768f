"""From activations of one prompt to columns of plain numbers. NaN and infinity raise EngineFailed.

Features are computed in blocks, so wide sources do not need memory for all of them (`costs.py` says how much).
What goes over blocks is a generator that pauses between them, so that others
may have a turn on the device.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from neuronpedia_inference.costs import BLOCK_ELEMENTS
from neuronpedia_inference.domain import ActiveFeatures, Dfa, Numbers, RankedFeatures, Ranking, TopFeatures
from neuronpedia_inference.errors import EngineFailed, InvalidRequest
from neuronpedia_inference.saes.encode import FeatureReader, LoadedSae
from neuronpedia_inference.saes.feature import OneReader
from neuronpedia_inference.saes.order import merge_topk, stable_topk

T = TypeVar("T")
Pauses = Generator[None, None, T]
"""Work that may be left between two steps; returns its result."""


def feature_values(reader: OneReader, x: Tensor, index: int) -> Numbers:
    """One feature at every position: [pos, width] -> [pos]."""
    values = reader.encode_feature(x, index)
    require_finite(values, reader)
    return on_host(values)


def projections(hidden: Tensor, vector: Sequence[float] | Numbers, hook: str) -> Numbers:
    """h·v at every position, the vector in the activation's dtype: [pos, width] -> [pos].

    Raises InvalidRequest if the vector is too large for it.
    """
    direction = torch.tensor(vector, dtype=hidden.dtype, device=hidden.device)
    values = (hidden @ direction).float()
    if not bool(values.isfinite().all()):
        if bool(hidden.isfinite().all()):
            raise InvalidRequest(f"The vector is too large: its product with {hook} is not finite.")
        raise EngineFailed(f"The model gave a value that is not finite at {hook!r}.")
    return on_host(values)


def predicted_similarity(reader: LoadedSae, x: Tensor) -> Numbers:
    """Cosines of what a temporal SAE predicts at two positions, less the mean over all: [pos, width] -> [pos, pos].

    0 where a prediction is the mean.
    """
    predicted = reader.predicted(x)
    require_finite(predicted, reader)
    predicted -= predicted.mean(dim=0)
    unit = torch.nn.functional.normalize(predicted, dim=1)
    return on_host(unit @ unit.T)


def top_features(reader: FeatureReader, x: Tensor, k: int, scales: Numbers | None = None) -> Pauses[TopFeatures]:
    """The k largest features of every position, zeros included, ties by index; k is cut to what there is.

    scales: [feature], by what an activation is multiplied for the ranking; None for ones.
    """
    k = min(k, reader.source.n_features)
    best: tuple[Tensor, ...] | None = None
    for first, acts in reader.blocks(x, block_of(x)):
        require_finite(acts, reader)
        keys = acts if scales is None else acts * _scale(scales, first, acts)
        keys, indices = stable_topk(keys, min(k, acts.shape[1]))
        found = (keys, indices + first) if scales is None else (keys, indices + first, acts.gather(1, indices))
        best = found if best is None else merge_topk(best, found, k)
        del acts, keys  # or two blocks would be held while the next is made
        yield
    assert best is not None, reader.source
    return TopFeatures(indices=on_host(best[1].int()), values=on_host(best[0 if scales is None else 2]))


def _scale(scales: Numbers, first: int, acts: Tensor) -> Tensor:
    """Of the features of a block [pos, feature] that begins at `first`."""
    return torch.as_tensor(scales[first : first + acts.shape[1]]).to(acts.device, acts.dtype)


def active_features(
    reader: FeatureReader, x: Tensor, *, first: int = 0, most: int
) -> Pauses[tuple[int, ActiveFeatures | None]]:
    """How many activations are not zero from position `first` on; and all of them, unless they are more than `most`."""
    n_found = 0
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, acts in reader.blocks(x, block_of(x)):
        require_finite(acts, reader)
        by_feature = acts[first:].T
        indices, positions = by_feature.nonzero(as_tuple=True)
        n_found += len(indices)
        if n_found <= most:
            kept.append((indices.int() + start, positions.int() + first, by_feature[indices, positions]))
        else:
            kept.clear()
        del acts, by_feature
        yield
    if n_found > most:
        return n_found, None
    indices, positions, values = (torch.cat(column) for column in zip(*kept, strict=True))
    return n_found, _by_first_firing(indices, positions, values)


def _by_first_firing(indices: Tensor, positions: Tensor, values: Tensor) -> ActiveFeatures:
    """Entries by feature, then position -> the features in the order in which a reader of the prompt meets them."""
    found, counts = indices.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    starts = ends - counts
    order = positions[starts].sort(stable=True).indices
    return ActiveFeatures(
        indices=on_host(found[order]),
        starts=on_host(starts[order]),
        ends=on_host(ends[order]),
        positions=on_host(positions),
        values=on_host(values),
    )


class FeatureRanker:
    """Ranks sources as they come, so that each may leave memory before the next arrives.

    Order: by the weighted sum over positions, or the maximum where no position has a weight, times the feature's scale
    where there are scales, descending; ties keep the order of the sources, then of the features. Zeros are ranked too.
    """

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self._names: list[str] = []
        self._offsets: list[int] = []
        self._n_features = 0
        self._best: tuple[Tensor, Tensor] | None = None
        self._rows = torch.empty(0, 0)

    def add(self, reader: FeatureReader, x: Tensor) -> Pauses[None]:
        """Take in one source: x [pos, width], the same number of positions each time."""
        self._names.append(reader.source.name)
        self._offsets.append(self._n_features)
        scales = self.ranking.scales.get(reader.source.name)
        for first, acts in reader.blocks(x, block_of(x)):
            kept = torch.cat((torch.zeros_like(acts[:1]), acts[1:])) if self.ranking.ignore_first else acts
            require_finite(kept, reader)
            del acts
            if self.ranking.least > 0:
                # Into a tensor of its own: activations of neurons are those that others read too.
                kept = torch.where(kept.amax(dim=0) >= self.ranking.least, kept, 0.0)
            scale = None if scales is None else _scale(scales, first, kept)
            self._add_block(self._n_features + first, kept, scale)
            del kept
            yield
        self._n_features += reader.source.n_features

    def result(self) -> RankedFeatures:
        keys, places = self._best if self._best is not None else (torch.empty(0), torch.empty(0, dtype=torch.long))
        offsets = torch.tensor(self._offsets, dtype=torch.long, device=places.device)
        numbers = torch.bucketize(places, offsets, right=True) - 1
        values = on_host(self._rows)
        return RankedFeatures(
            sources=tuple(self._names),
            source_numbers=on_host(numbers.int()),
            indices=on_host((places - offsets[numbers]).int()),
            values=values,
            max_value_indices=values.argmax(axis=1) if len(values) else on_host(places),
            sum_values=on_host(keys if self.ranking.weights else torch.zeros_like(keys)),
        )

    def _add_block(self, place: int, acts: Tensor, scale: Tensor | None) -> None:
        """Merge the winners of acts [pos, block], whose first feature has this place among all features.

        scale: [block]; None for ones.
        """
        keys = self._keys(acts) if scale is None else self._keys(acts) * scale
        keys, indices = stable_topk(keys, min(self.ranking.limit, acts.shape[1]))
        rows = acts[:, indices].T
        if self._best is None:
            self._best, self._rows = (keys, indices + place), rows
            return
        # The rows travel with their keys: encoding the winners again could differ in the last digit.
        slots = torch.arange(len(self._rows) + len(rows), device=keys.device)
        rows = torch.cat((self._rows, rows))
        places = torch.cat((self._best[1], indices + place))
        n = len(self._rows)
        merged, order = merge_topk((self._best[0], slots[:n]), (keys, slots[n:]), self.ranking.limit)
        self._best, self._rows = (merged, places[order]), rows[order]

    def _keys(self, acts: Tensor) -> Tensor:
        """[pos, feature] -> [feature]"""
        if not self.ranking.weights:
            return acts.amax(dim=0)
        times = torch.tensor(list(self.ranking.weights.values()), dtype=acts.dtype, device=acts.device)
        # Not a matrix product, whose rounding would depend on where a feature lies in its block.
        return acts[list(self.ranking.weights)].mul_(times[:, None]).sum(dim=0)


def dfa(pattern: Tensor, v: Tensor, encoder_column: Tensor, target: int) -> Dfa:
    """What each source position gave to a feature at position `target` through attention.

    pattern [head, pos, pos] (softmax), v [pos, kv head, d_head], encoder_column [head * d_head].
    Raises EngineFailed if the column is not as wide as the heads together.
    """
    n_heads, (_, n_kv, d_head) = pattern.shape[0], v.shape
    if encoder_column.numel() != n_heads * d_head:
        raise EngineFailed(f"The encoder reads {encoder_column.numel()} numbers, the heads give {n_heads * d_head}.")
    dtype = torch.float32
    for operand in (pattern, v, encoder_column):
        dtype = torch.promote_types(dtype, operand.dtype)
    weights = encoder_column.to(v.device, dtype).reshape(n_kv, n_heads // n_kv, d_head)
    attention = pattern[:, target].to(dtype).reshape(n_kv, n_heads // n_kv, -1)
    values = torch.einsum("kgs,skd,kgd->s", attention, v.to(dtype), weights)
    if not bool(values.isfinite().all()):
        raise EngineFailed("Direct feature attribution gave a value that is not finite.")
    return Dfa(on_host(values), target)


def on_host(values: Tensor) -> Numbers:
    """A copy or a view as an array, compact and without a tensor's history."""
    return values.detach().cpu().contiguous().numpy()


def extremes(values: Tensor) -> Tensor:
    """[2], the least and the largest. They carry NaN and infinity, at a fraction of the cost of testing every element.

    Of at least one element.
    """
    return torch.stack(values.aminmax())


def block_of(x: Tensor) -> int:
    """Features per block for a prompt [pos, width]."""
    return max(256, BLOCK_ELEMENTS // max(1, len(x)))


def require_finite(acts: Tensor, reader: OneReader) -> None:
    """Raises EngineFailed if there is a NaN or an infinity in acts [pos, feature]."""
    if acts.numel() and not bool(extremes(acts).isfinite().all()):
        raise EngineFailed(f"Source {reader.source.name!r} gave a value that is not finite.")
