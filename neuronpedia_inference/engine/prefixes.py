"""Keys and values of texts that rows have gone through, for rows whose prompts begin alike: the next turn of a chat.

A position may be taken over where the token is the same, all before it are, and the same edits have acted on both, as
much; edits that act nowhere up to there do not count. Prompt and completion count alike: what a row has written is
prompt in the next turn. What is watched of a position is kept too, and of who watches only what somebody has read is
taken over. Rows whose edits wait for conditions take no part: what those have seen is kept nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.edits.plan import N_TOLD
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.engine.protocol import RowSpec, Watch
from neuronpedia_inference.recent import Recent

LEAST_POSITIONS = 16
"""Fewer are run again as quickly."""

Layers = Sequence[tuple[Tensor, Tensor] | None]
"""Keys and values [head, pos, d_head] by layer; None of a layer that attends to those of another."""


Acts = str
"""What every edit that acts at a position does, and how much of it, as a digest; empty where none acts."""
Read = Mapping[Hashable, Numbers]
"""By point, side of its edits and reading: [pos, n_numbers], of the first positions."""


@dataclass(frozen=True)
class Text:
    positions: tuple[tuple[int, Acts], ...]
    """Token, and what acts there."""

    def n_shared(self, other: Text) -> int:
        """Positions from the first on that are alike."""
        pairs = zip(self.positions, other.positions, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.positions), len(other.positions)))

    def is_within(self, other: Text) -> bool:
        return self.n_shared(other) == len(self.positions)


class Kept(NamedTuple):
    """What a row has left."""

    layers: Layers
    read: Read


class Known(NamedTuple):
    """What is kept of the beginning of a prompt."""

    layers: Layers
    n_positions: int
    numbers: Sequence[Numbers | None]
    """Of every row that begins so, what it would read there."""


class Prefixes:
    """What is kept shares its budget with others."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    def keep(
        self, spec: RowSpec, generated: Sequence[int], length: int, layers: Layers, numbers: Numbers | None = None
    ) -> None:
        """What a row leaves, of its first `length` positions. `layers` are views, and copied if there is room.

        numbers: what was read of it, as in `RowStep.numbers`.
        """
        if spec.triggers:
            return
        text, read = text_of(spec, generated, length), _by_reading(spec, numbers, length)
        if len(text.positions) < LEAST_POSITIONS:
            return
        within = next((other for other in self._texts() if text.is_within(other)), None)
        if within is not None:
            self._learn(within, read)
            return
        for other in [other for other in self._texts() if other.is_within(text)]:
            read = _longest(self._kept(other).read, read)
            self._recent.drop(other)
        self._recent.put(text, lambda: Kept(_copied(layers), read), _n_bytes(layers, read))

    def find(self, rows: Sequence[RowSpec]) -> Known | None:
        """What is kept of the longest beginning of a prompt that these rows share, edits included. The last token has
        to be run, and where rows read what nobody has read before."""
        first = rows[0]
        if first.triggers:
            return None
        text, acts_from = text_of(first), [row.acts_from for row in rows]
        most = len(text.positions) - 1
        usable: dict[Text, int] = {}
        for other in self._texts():
            n_shared = min(most, text.n_shared(other))
            if n_shared >= LEAST_POSITIONS:
                read = self._kept(other).read
                told = (_n_told(row, read, n_shared, acts) for row, acts in zip(rows, acts_from, strict=True))
                usable[other] = min(told)
        best = max(usable, key=lambda other: usable[other], default=None)
        if best is None or usable[best] < LEAST_POSITIONS:
            return None
        kept = self._kept(best)
        self._recent.get(best)
        return Known(kept.layers, usable[best], [_told(row, kept.read, usable[best]) for row in rows])

    def _texts(self) -> Iterable[Text]:
        return [key for key in self._recent if isinstance(key, Text)]

    def _kept(self, text: Text) -> Kept:
        kept = self._recent.look(text)
        assert kept is not None
        return kept

    def _learn(self, text: Text, read: Read) -> None:
        """More numbers of a text that is kept."""
        kept = self._kept(text)
        more = _longest(kept.read, read)
        n_bytes = _n_bytes(kept.layers, more)
        if n_bytes <= self._recent.budget_bytes and any(more[key] is not kept.read.get(key) for key in more):
            self._recent.drop(text)
            self._recent.put(text, lambda: Kept(kept.layers, more), n_bytes)


def text_of(spec: RowSpec, generated: Sequence[int] = (), length: int | None = None) -> Text:
    """A row's tokens with what acts on them; of its prompt if nothing is said of what it has generated."""
    tokens = [*spec.prompt_ids, *generated][:length]
    if not spec.edits:
        return Text(tuple((token, "") for token in tokens))
    places, ids = np.arange(len(tokens)), np.array(tokens)
    column = {selection: place for place, selection in enumerate(dict.fromkeys(edit.on for edit in spec.edits))}
    weights = np.stack([selection.weights(places, ids, len(spec.prompt_ids)) for selection in column], axis=1)
    somewhere = [bool(of_selection.any()) for of_selection in weights.T]
    does = [(column[edit.on], _digest(edit)) for edit in spec.edits if somewhere[column[edit.on]]]
    acts: dict[bytes, Acts] = {}
    for row in weights:
        if row.tobytes() not in acts:
            here = [f"{digest} {float(row[place]).hex()}" for place, digest in does if row[place]]
            acts[row.tobytes()] = hashlib.sha256("\n".join(here).encode()).hexdigest() if here else ""
    return Text(tuple((token, acts[row.tobytes()]) for token, row in zip(tokens, weights, strict=True)))


# What has been read of it


def _by_reading(spec: RowSpec, numbers: Numbers | None, length: int) -> Read:
    """Of the readings that others may have too."""
    if numbers is None or spec.read_from:
        return {}
    found: dict[Hashable, Numbers] = {}
    first = _n_of_edits(spec)
    for watch, is_before in spec.readings:
        behind = first + watch.reading.n_numbers
        if not watch.proves:
            found[_key(watch, is_before)] = numbers[:length, first:behind].copy()
        first = behind
    return found


def _n_told(spec: RowSpec, read: Read, n_shared: int, acts_from: int) -> int:
    """Of so many positions, those from the first on of which is known what the row reads there. Before `acts_from`
    nothing edits it, so that both sides of edits are the same."""
    bounds = [acts_from] if spec.tells_edits and spec.edits else [n_shared]
    for watch, is_before in spec.readings:
        own, other = read.get(_key(watch, is_before)), read.get(_key(watch, not is_before))
        if watch.proves:
            bounds.append(acts_from)
        elif own is not None:
            bounds.append(len(own))
        else:
            bounds.append(0 if other is None else min(len(other), acts_from))
    return min(n_shared, max(spec.read_from, min(bounds)))


def _told(spec: RowSpec, read: Read, n_positions: int) -> Numbers | None:
    """[pos, n] as the row would have read them: of the first positions of its prompt, from `read_from` on."""
    here = slice(min(spec.read_from, n_positions), n_positions)
    n_read = here.stop - here.start
    if not (spec.is_read and n_read):
        return None
    parts: list[Numbers] = [np.zeros((n_read, _n_of_edits(spec)), np.float32)]
    for watch, is_before in spec.readings:
        found = read.get(_key(watch, is_before), read.get(_key(watch, not is_before)))
        if watch.proves or found is None:
            parts.append(np.zeros((n_read, watch.reading.n_numbers), np.float32))
        else:
            parts.append(found[here])
    return np.concatenate(parts, axis=1)


def _key(watch: Watch, is_before: bool) -> Hashable:
    return watch.point, is_before, watch.reading.key


def _n_of_edits(spec: RowSpec) -> int:
    return N_TOLD * len(spec.edits) if spec.tells_edits else 0


def _longest(some: Read, others: Read) -> Read:
    return {**some, **{key: one for key, one in others.items() if key not in some or len(one) > len(some[key])}}


def _n_bytes(layers: Layers, read: Read) -> int:
    held = [one for layer in layers if layer is not None for one in layer]
    return sum(one.nbytes for one in (*held, *read.values()))


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
