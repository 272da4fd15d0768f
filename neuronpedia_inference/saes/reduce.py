"""From activations of one prompt to plain values. NaN and infinity raise EngineFailed.

Features are computed in blocks, so wide sources do not need memory for all of them. At the peak, for a prompt of `pos`
tokens and a source of F features, in float32:

block   4 bytes × min(pos × F, max(2²², 256 × pos))
peak    6 × block + 16 × pos × width bytes; 8 × pos × F more for architectures that compare features (TopK and others),
        16 MiB more for gated ones

The results come on top: 8 bytes for every value kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import torch
from torch import Tensor

from neuronpedia_inference.domain import ActiveFeature, Dfa, FeatureValue, RankedFeature, Ranking, Source
from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.saes.encode import COPIED_NUMBERS, FeatureReader, encodes_by_column
from neuronpedia_inference.saes.order import merge_topk, stable_topk

BLOCK_ELEMENTS = 2**22
"""Activations computed at once: 16 MiB in float32."""


def peak_bytes(source: Source, n_positions: int) -> int:
    """Memory that reducing one prompt takes at the most, its results aside; the formula above."""
    every = n_positions * source.n_features
    block = min(every, max(BLOCK_ELEMENTS, 256 * n_positions))
    compared = 0 if encodes_by_column(source) else 8 * every
    copied = 4 * COPIED_NUMBERS if source.architecture == "gated" else 0
    return 24 * block + 16 * n_positions * source.width + compared + copied


def feature_values(reader: FeatureReader, x: Tensor, index: int) -> tuple[float, ...]:
    """One feature at every position: [pos, width] -> pos values."""
    return tuple(_plain(reader.encode_feature(x, index), reader))


def top_features(reader: FeatureReader, x: Tensor, k: int) -> tuple[tuple[FeatureValue, ...], ...]:
    """The k largest features of every position, zeros included, ties by index; k is cut to what there is."""
    k = min(k, reader.source.n_features)
    best: tuple[Tensor, Tensor] | None = None
    for first, acts in reader.blocks(x, _block(x)):
        _require_finite(acts, reader)
        values, indices = stable_topk(acts, min(k, acts.shape[1]))
        found = (values, indices + first)
        best = found if best is None else merge_topk(best, found, k)
        del acts  # or two blocks would be held while the next is made
    assert best is not None, reader.source
    rows = zip(best[1].tolist(), best[0].tolist(), strict=True)
    return tuple(tuple(FeatureValue(i, v) for i, v in zip(*row, strict=True)) for row in rows)


def active_features(reader: FeatureReader, x: Tensor) -> tuple[ActiveFeature, ...]:
    """Every non-zero activation, by position, then feature."""
    found: list[ActiveFeature] = []
    for first, acts in reader.blocks(x, _block(x)):
        where = acts.nonzero(as_tuple=True)
        values = _plain(acts[where], reader)
        places = zip(where[0].tolist(), where[1].tolist(), values, strict=True)
        found.extend(ActiveFeature(position, first + index, value) for position, index, value in places)
        del acts
    return tuple(sorted(found, key=lambda active: (active.position, active.index)))


def rank_features(readers: Iterable[tuple[FeatureReader, Tensor]], ranking: Ranking) -> tuple[RankedFeature, ...]:
    """The features of all sources that fire most on one prompt; `readers` is consumed one by one."""
    ranker = FeatureRanker(ranking)
    for reader, x in readers:
        ranker.add(reader, x)
    return ranker.result()


class FeatureRanker:
    """Ranks sources as they come, so that each may leave memory before the next arrives.

    Order: by the sum over `ranking.token_indexes`, or the maximum where there are none, descending; ties keep
    the order of the sources, then of the features. Zeros are ranked too.
    """

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self._names: list[str] = []
        self._offsets: list[int] = []
        self._n_features = 0
        self._best: tuple[Tensor, Tensor] | None = None
        self._rows = torch.empty(0)

    def add(self, reader: FeatureReader, x: Tensor) -> None:
        """Take in one source: x [pos, width], the same number of positions each time."""
        self._names.append(reader.source.name)
        self._offsets.append(self._n_features)
        for first, acts in reader.blocks(x, _block(x)):
            kept = torch.cat((torch.zeros_like(acts[:1]), acts[1:])) if self.ranking.ignore_first else acts
            _require_finite(kept, reader)
            del acts
            self._add_block(self._n_features + first, kept)
            del kept
        self._n_features += reader.source.n_features

    def result(self) -> tuple[RankedFeature, ...]:
        if self._best is None:
            return ()
        keys, places = (part.tolist() for part in self._best)
        rows = zip(keys, places, self._rows.tolist(), strict=True)
        return tuple(self._ranked(key, place, row) for key, place, row in rows)

    def _add_block(self, place: int, acts: Tensor) -> None:
        """Merge the winners of acts [pos, block], whose first feature has this place among all features."""
        keys, indices = stable_topk(self._keys(acts), min(self.ranking.limit, acts.shape[1]))
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
        chosen = list(self.ranking.token_indexes)
        return acts[chosen].sum(dim=0) if chosen else acts.amax(dim=0)

    def _ranked(self, key: float, place: int, row: list[float]) -> RankedFeature:
        number = bisect_right(self._offsets, place) - 1
        largest = max(row)
        return RankedFeature(
            source=self._names[number],
            index=place - self._offsets[number],
            values=tuple(row),
            max_value=largest,
            max_value_index=row.index(largest),
            sum_values=key if self.ranking.token_indexes else 0.0,
        )


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
    return Dfa(tuple(values.tolist()), target)


def _block(x: Tensor) -> int:
    """Features per block for a prompt [pos, width]."""
    return max(256, BLOCK_ELEMENTS // max(1, len(x)))


def _plain(values: Tensor, reader: FeatureReader) -> list[float]:
    _require_finite(values, reader)
    return values.tolist()


def _require_finite(acts: Tensor, reader: FeatureReader) -> None:
    # Extremes carry NaN and infinity, at a fraction of the cost of testing every element.
    if acts.numel() and not bool(torch.stack(acts.aminmax()).isfinite().all()):
        raise EngineFailed(f"Source {reader.source.name!r} gave a value that is not finite.")
