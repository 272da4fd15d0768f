"""What edits have done, from numbers that are read where they write: before the first edit of that place, and behind
the last. At a place are read, in this order,

    ‖h‖                              the norm of what passes
    h·v̂ of every edit there          v̂ is the direction that it writes along: a decoder row, or a vector, at unit length
    a of every edit that reads one   the activation of its feature, unless that is read elsewhere (transcoders)

An edit has acted at a token that it selects if h·v̂ is another one behind the edits than before them. Where a condition
decides beside the selection, edits of the same place cannot be told apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from neuronpedia_inference.domain import Numbers, Tokens, Written
from neuronpedia_inference.edits.plan import Edit
from neuronpedia_inference.edits.select import Selection


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


@dataclass(slots=True)
class Traced:
    """One edit: where it acted first and last."""

    resolved: ResolvedEdit
    is_known: bool = True
    """Whether it can be told from the others of its place."""
    first: Moment | None = None
    last: Moment | None = None
    _doses: float = 0.0
    """The sum over generated tokens."""
    _n_generated: int = 0

    @property
    def dose(self) -> float | None:
        """The mean over generated tokens, 0 where it did not act; None where it cannot be told."""
        return self._doses / self._n_generated if self.is_known and self._n_generated else None

    def push(self, doses: Numbers) -> None:
        """[pos]: at the next generated tokens."""
        self._doses += float(doses.sum())
        self._n_generated += len(doses)


def by_place(edits: Sequence[ResolvedEdit]) -> dict[str, list[int]]:
    """Edits by the place where they write, both in the order in which they come up."""
    places: dict[str, list[int]] = {}
    for number, one in enumerate(edits):
        places.setdefault(one.point, []).append(number)
    return places


def n_numbers(edits: Sequence[ResolvedEdit]) -> int:
    """Read at every position, on both sides of the edits of every place."""
    return 2 * sum(1 + len(some) + _n_reading(edits, some) for some in by_place(edits).values())


def _n_reading(edits: Sequence[ResolvedEdit], some: Sequence[int]) -> int:
    return sum(edits[number].reads_here for number in some)


@dataclass
class Proof:
    """Of one row, as its numbers come."""

    edits: Sequence[ResolvedEdit]
    prompt: Tokens
    traced: list[Traced] = field(init=False)
    _waiting: deque[tuple[int, str]] = field(init=False)
    """Ids and tokens whose numbers are to come."""
    _n_seen: int = 0

    def __post_init__(self) -> None:
        self._waiting = deque(zip(self.prompt.ids, self.prompt.strings, strict=True))
        alone = {some[0] for some in by_place(self.edits).values() if len(some) == 1}
        self.traced = [Traced(one, one.edit.when is None or n in alone) for n, one in enumerate(self.edits)]

    def add(self, written: Written) -> None:
        """Those of an edited row end in the numbers that `n_numbers` counts."""
        self._waiting.extend(zip(written.token_ids, written.tokens, strict=True))
        if written.numbers is None or not self.edits:
            return
        known = [self._waiting.popleft() for _ in written.numbers]
        passed = _Passed(self._n_seen, *zip(*known, strict=True)) if known else _Passed(self._n_seen, (), ())
        self._n_seen += len(known)
        left = written.numbers[:, -n_numbers(self.edits) :]
        for some in by_place(self.edits).values():
            n_here = 1 + len(some) + _n_reading(self.edits, some)
            here, left = left[:, : 2 * n_here], left[:, 2 * n_here :]
            sides = here.reshape(len(here), 2, n_here)
            activation = 1 + len(some)
            for column, number in enumerate(some, start=1):
                columns = [0, column]
                if self.edits[number].reads_here:
                    columns.append(activation)
                    activation += 1
                self._trace(self.traced[number], passed, sides[:, :, columns])

    def _trace(self, traced: Traced, passed: _Passed, sides: Numbers) -> None:
        """sides: [pos, side, n], of norm, projection, and activation where there is one."""
        selected = traced.resolved.on.weights(passed.places, np.array(passed.ids), len(self.prompt)) > 0
        acted = np.flatnonzero(selected & (sides[:, 0, 1] != sides[:, 1, 1]))
        moved = np.where(selected, np.abs(sides[:, 1, 1] - sides[:, 0, 1]), 0.0)
        norms = np.maximum(sides[:, 0, 0], np.finfo(np.float32).tiny)
        traced.push((moved / norms)[passed.places >= len(self.prompt)])
        if len(acted) and traced.is_known:
            traced.first = traced.first or passed.moment(acted[0], sides)
            traced.last = passed.moment(acted[-1], sides)


@dataclass(frozen=True)
class _Passed:
    """Tokens whose numbers have come."""

    first: int
    ids: tuple[int, ...]
    tokens: tuple[str, ...]

    @property
    def places(self) -> NDArray[np.int64]:
        return np.arange(self.first, self.first + len(self.ids))

    def moment(self, place: int, sides: Numbers) -> Moment:
        (norm, *before), (_, *after) = sides[place].tolist()
        return Moment(
            position=self.first + int(place),
            token=self.tokens[place],
            before=before[0],
            after=after[0],
            norm=norm,
            activation_before=before[1] if len(before) > 1 else None,
            activation_after=after[1] if len(after) > 1 else None,
        )
