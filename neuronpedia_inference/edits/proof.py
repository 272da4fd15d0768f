"""What edits have done, from numbers that are read where they write: before the first edit of that place, and behind
the last. At a place are read, in this order,

    ‖h‖                              the norm of what passes
    h·v̂ of every edit there          v̂ is the direction that it writes along: a decoder row, or a vector, at unit length
    a of every edit that reads one   the activation of its feature, unless that is read elsewhere (transcoders)

An edit has acted at a token that it selects if h·v̂ is another one behind the edits than before them. Where a condition
decides beside the selection, edits of the same place cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuronpedia_inference.domain import Numbers, Tokens, Written
from neuronpedia_inference.edits.plan import Edit
from neuronpedia_inference.edits.select import Selection

Places = NDArray[np.int64]
PIECE_NUMBERS = 2**14
"""Looked through without a stop."""


@dataclass(frozen=True, slots=True)
class ResolvedEdit:
    """An edit of a plan, as it is applied."""

    edit: Edit
    point: str
    """Where it writes."""
    amount: float
    """In absolute units, or a dose."""
    on: Selection
    reads_here: bool
    """Whether it reads a feature where it writes."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A token at which an edit has acted."""

    position: int
    token: str
    before: float
    """h·v̂ before the edits of the place."""
    after: float
    norm: float
    """‖h‖ before them."""
    activation_before: float | None
    activation_after: float | None

    @property
    def dose(self) -> float:
        """How far it was moved along v̂, as a share of what passed."""
        return abs(self.after - self.before) / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class Traced:
    """One edit: where it acted first and last."""

    resolved: ResolvedEdit
    is_known: bool
    """Whether it can be told from the others of its place."""
    first: Moment | None
    last: Moment | None


def by_place(edits: Sequence[ResolvedEdit]) -> dict[str, list[int]]:
    """Edits by the place where they write, both in the order in which they come up."""
    places: dict[str, list[int]] = {}
    for number, one in enumerate(edits):
        places.setdefault(one.point, []).append(number)
    return places


def n_numbers(edits: Sequence[ResolvedEdit]) -> int:
    """Read at every position, on both sides of the edits of every place."""
    return 2 * (len(by_place(edits)) + len(edits) + sum(one.reads_here for one in edits))


class Proof:
    """Of one row, as its numbers come."""

    def __init__(self, edits: Sequence[ResolvedEdit], prompt: Tokens) -> None:
        self.edits = edits
        self._n_prompt = len(prompt)
        self._ids = list(prompt.ids)
        self._tokens = list(prompt.strings)
        self._n_seen = 0
        """Positions whose numbers have come."""
        self._n_numbers = n_numbers(edits)
        self._places = [_Place([edits[number] for number in some]) for some in by_place(edits).values()]
        self._place_of = {
            number: (place, within)
            for place, some in zip(self._places, by_place(edits).values(), strict=True)
            for within, number in enumerate(some)
        }

    def add(self, written: Written) -> Generator[None, None, None]:
        """Those of an edited row end in the numbers that `n_numbers` counts. A yield after each piece of the work."""
        self._ids += written.token_ids
        self._tokens += written.tokens
        if written.numbers is None or not self.edits:
            return
        step = max(1, PIECE_NUMBERS // self._n_numbers)
        for first in range(0, len(written.numbers), step):
            self._take(written.numbers[first : first + step, -self._n_numbers :])
            yield

    def _take(self, left: Numbers) -> None:
        at = np.arange(self._n_seen, self._n_seen + len(left))
        self._n_seen += len(at)
        ids = np.array(self._ids[at[0] : at[-1] + 1])
        for place in self._places:
            here, left = left[:, : 2 * place.n_numbers], left[:, 2 * place.n_numbers :]
            place.add(at, ids, here.reshape(len(at), 2, place.n_numbers), self._n_prompt)

    def traced(self, number: int) -> Traced:
        """What is known of an edit."""
        place, within = self._place_of[number]
        known = self._is_known(number)
        first, last = (self._moment(side, within) if known else None for side in (place.first, place.last))
        return Traced(self.edits[number], known, first, last)

    @property
    def doses(self) -> list[float | None]:
        """Of every edit the mean over generated tokens, 0 where it did not act; None where it cannot be told."""
        return [self._dose(number) if self._is_known(number) else None for number in range(len(self.edits))]

    def _dose(self, number: int) -> float | None:
        place, within = self._place_of[number]
        return float(place.doses[within]) / place.n_generated if place.n_generated else None

    def _is_known(self, number: int) -> bool:
        return self.edits[number].edit.when is None or len(self._place_of[number][0].selections) == 1

    def _moment(self, found: _Found, within: int) -> Moment | None:
        position = int(found.positions[within])
        if position < 0:
            return None
        norm, before, after, *activations = found.numbers[within].tolist()
        read = (None if math.isnan(one) else one for one in activations)
        return Moment(position, self._tokens[position], before, after, norm, *read)


class _Found:
    """Of every edit of a place, a token at which it acted."""

    def __init__(self, n_edits: int) -> None:
        self.positions = np.full(n_edits, -1)
        """[edit]; -1 where there is none."""
        self.numbers = np.zeros((n_edits, 5))
        """[edit, 5]: norm, projection before and after, activation before and after (NaN where none is read)"""


class _Place:
    """The edits that write at one place."""

    def __init__(self, edits: Sequence[ResolvedEdit]) -> None:
        n_edits = len(edits)
        self.selections = [one.on for one in edits]
        self._distinct = list(dict.fromkeys(self.selections))
        self._which = [self._distinct.index(one) for one in self.selections]
        reads = np.array([one.reads_here for one in edits])
        self._activation = np.where(reads, n_edits + np.cumsum(reads), 0)
        """[edit]: the column of its activation; 0 where it has none."""
        self.n_numbers = 1 + n_edits + int(reads.sum())
        self.first, self.last = _Found(n_edits), _Found(n_edits)
        self.doses = np.zeros(n_edits)
        """[edit]: the sum over generated tokens."""
        self.n_generated = 0

    def add(self, at: Places, ids: Places, sides: Numbers, n_prompt: int) -> None:
        """at, ids: [pos]. sides: [pos, side, n] of norm, projections and activations."""
        n_edits = len(self.selections)
        change = np.abs(sides[:, 1, 1 : 1 + n_edits] - sides[:, 0, 1 : 1 + n_edits])
        selected = np.stack([on.weights(at, ids, n_prompt) > 0 for on in self._distinct], axis=1)
        change = np.where(selected[:, self._which], change, 0.0)
        acted = change > 0
        is_generated = at >= n_prompt
        norms = np.maximum(sides[is_generated, 0, :1], np.finfo(np.float32).tiny)
        self.doses += (change[is_generated] / norms).sum(axis=0)
        self.n_generated += int(is_generated.sum())
        some = np.asarray(acted.any(axis=0))
        self._note(self.first, some & (self.first.positions < 0), acted.argmax(axis=0), at, sides)
        self._note(self.last, some, len(at) - 1 - acted[::-1].argmax(axis=0), at, sides)

    def _note(self, into: _Found, edits: NDArray[np.bool_], rows: Places, at: Places, sides: Numbers) -> None:
        """edits: [edit], of which there is something to note. rows: [edit], where."""
        chosen = np.flatnonzero(edits)
        rows = rows[chosen]
        column = self._activation[chosen]
        into.positions[chosen] = at[rows]
        into.numbers[chosen, 0] = sides[rows, 0, 0]
        for side in (0, 1):
            into.numbers[chosen, 1 + side] = sides[rows, side, 1 + chosen]
            into.numbers[chosen, 3 + side] = np.where(column > 0, sides[rows, side, column], np.nan)
