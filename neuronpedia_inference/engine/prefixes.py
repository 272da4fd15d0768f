"""Keys and values of texts that rows have gone through, for rows whose prompts begin alike: the next turn of a chat.

A position may be taken over where the token is the same, all before it are, and the same edits have acted on both, as
much. Prompt and completion count alike: what a row has written is prompt in the next turn. Rows whose edits wait for
conditions take no part: what those have seen is kept nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from torch import Tensor

from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.recent import Recent

LEAST_POSITIONS = 16
"""Fewer are run again as quickly."""

Layers = Sequence[tuple[Tensor, Tensor] | None]
"""Keys and values [head, pos, d_head] by layer; None of a layer that attends to those of another."""


@dataclass(frozen=True)
class _Text:
    edits: tuple[str, ...]
    """What each edit does, as digests."""
    positions: tuple[tuple[int, tuple[float, ...]], ...]
    """Token, and how much each edit acts there."""

    def n_shared(self, other: _Text) -> int:
        """Positions from the first on that are alike."""
        if self.edits != other.edits:
            return 0
        pairs = zip(self.positions, other.positions, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.positions), len(other.positions)))

    def is_within(self, other: _Text) -> bool:
        return self.n_shared(other) == len(self.positions)


class Prefixes:
    """What is kept shares its budget with others."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    def keep(self, spec: RowSpec, generated: Sequence[int], length: int, layers: Layers, n_bytes: int) -> None:
        """What a row leaves, of its first `length` positions. `layers` are views, and copied if there is room."""
        if spec.triggers:
            return
        text = _text(spec, generated, length)
        if len(text.positions) < LEAST_POSITIONS or any(text.is_within(other) for other in self._texts()):
            return
        for other in [other for other in self._texts() if other.is_within(text)]:
            self._recent.drop(other)
        self._recent.put(text, lambda: _copied(layers), n_bytes)

    def find(self, spec: RowSpec) -> tuple[Layers, int] | None:
        """What is kept of the longest beginning of a prompt, and its length. The last token has to be run."""
        if spec.triggers:
            return None
        text = _text(spec)
        most = len(text.positions) - 1
        shared = {other: min(most, text.n_shared(other)) for other in self._texts()}
        best = max(shared, key=lambda other: shared[other], default=None)
        if best is None or shared[best] < LEAST_POSITIONS:
            return None
        layers = self._recent.get(best)
        return None if layers is None else (layers, shared[best])

    def _texts(self) -> Iterable[_Text]:
        return [key for key in self._recent if isinstance(key, _Text)]


def _text(spec: RowSpec, generated: Sequence[int] = (), length: int | None = None) -> _Text:
    tokens = [*spec.prompt_ids, *generated][:length]
    places, ids = np.arange(len(tokens)), np.array(tokens)
    selections = list(dict.fromkeys(edit.on for edit in spec.edits))
    weights = [selection.weights(places, ids, len(spec.prompt_ids)).tolist() for selection in selections]
    acts = zip(*weights, strict=True) if weights else repeat(())
    digests = tuple(f"{selections.index(edit.on)} {_digest(edit)}" for edit in spec.edits)
    return _Text(digests, tuple(zip(tokens, acts, strict=bool(weights))))


def _digest(edit: RowEdit) -> str:
    """Of all that it does, wherever that is."""
    found = hashlib.sha256(f"{edit.point.name} {edit.do} {edit.amount!r} {edit.is_dose} {edit.most!r}".encode())
    for vector in (edit.vector, edit.other):
        found.update(b"none" if vector is None else _bytes(vector))
    for feature in (edit.feature, edit.other_feature):
        if feature is not None:
            gauge = feature.gauge
            numbers = (gauge.shift, gauge.scale, gauge.bias, gauge.gate, gauge.threshold, gauge.least, gauge.norm)
            found.update(f"{feature.key} {feature.elsewhere} {numbers!r}".encode() + _bytes(gauge.column))
    return found.hexdigest()


def _bytes(vector: Tensor) -> bytes:
    return vector.detach().float().cpu().numpy().tobytes()


def _copied(layers: Layers) -> Layers:
    return [None if layer is None else (layer[0].clone(), layer[1].clone()) for layer in layers]
