"""Edits as tables: what is done at one point to every row of a batch, in one formula.

An edit has a number a that is read (`gauge.py`), and a vector d. What becomes of a is written along d:

    h ← h + w·(clip(alpha·a + beta, lo, hi) − a)·u·d

w, between 0 and 1, is how much the position is edited (`select.py`); u undoes the normalisation under which a was read.
What only adds reads nothing: a = 0. A dose multiplies beta, lo and hi by ‖h‖, of h before the point's first edit.

Edits come in groups. All numbers of a group are read from the h that the group found, and what becomes of them is
written together: h + Σ (xᵢ − aᵢ)·uᵢ·dᵢ. So what an SAE does not explain of h stays: with all its features decoded,
h' − decode(x) = h − decode(a). Edits of one feature in a group act on one number, one after the other. A run of feature
edits is a group, a run of additions is one, and every edit of a direction is one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.edits.gauges import Gauges, GaugeTable, norms
from neuronpedia_inference.edits.plan import N_TOLD
from neuronpedia_inference.edits.row_table import BY_NORM, STAYS, Ints, Places, RowTable, Trait
from neuronpedia_inference.points import Point

Recorder = Callable[[Tensor, Tensor], None]
"""Is told what edits find and do: [row, pos, place, 5] numbers of every place (`EditTable.places`), and [row, pos, 1]
norms of what the point's first edit has found. The numbers, in float32:

    share    how much the edit acts there, from 0 to 1
    before   what it reads, of the h that its group has found
    target   what is to become of that where it acts wholly
    after    what is read again once all edits of the point are done, which need not be the target: encoder columns are
             not decoder rows. Of a transcoder, which is read elsewhere, what was before
    change   by how much its number is changed, in units of the length of what it writes (`groups.length_of`)

Of additions, which read nothing, only share and change mean something.
"""


class EditTable:
    """The edits of every row at one point."""

    def __init__(self, rows: Sequence[RowTable | None], *, is_weighted: bool = False) -> None:
        """`rows`: None for a row without edits here; at least one has some. is_weighted: whether some act on some
        positions only."""
        there = [(row, table) for row, table in enumerate(rows) if table is not None]
        self.rows: Mapping[int, RowTable] = dict(there)
        """Those that have edits here, by number."""
        self._shape = _Shape.of([table for _, table in there])
        self._needs_norm = any(table.needs_norm for _, table in there)
        self._rounds = _rounds(len(rows), there, self._shape, is_weighted=is_weighted)

    def places(self, row: int) -> Ints:
        """Of a row's edits at this point, in their order, among what a recorder is told."""
        return self._shape.moves(self.rows[row].found)

    @property
    def elsewhere(self) -> Mapping[Point, Callable[[Tensor], None]]:
        """What must be shown [row, pos, width] of other points before the table is called in the same pass."""
        points = {point for one in self._rounds for point in one.elsewhere}
        return {point: partial(self._show, point) for point in sorted(points)}

    def __call__(self, hidden: Tensor, weights: Tensor | None = None, record: Recorder | None = None) -> Tensor:
        """[row, pos, ...width] -> the same, edited, in the same dtype.

        weights: [row, pos, column], from 0 to 1; None where all are 1.
        """
        found = changed = hidden.flatten(2)
        norm = norms(found) if self._needs_norm or record is not None else None
        traces: list[Trace] = []
        for one in self._rounds:
            change, trace = one.change(changed, weights, norm)
            changed = changed + change
            traces += [] if record is None else [trace]
        if record is not None:
            assert norm is not None
            told = [one.told(trace, changed) for one, trace in zip(self._rounds, traces, strict=True)]
            record(torch.cat(told, 2), norm)
        return changed.reshape(hidden.shape)

    def _show(self, point: Point, hidden: Tensor) -> None:
        for one in self._rounds:
            if point in one.elsewhere:
                one.elsewhere[point] = one.read_elsewhere(point, hidden.flatten(2))


class Moved(NamedTuple):
    """What one step has found and done: [row, pos, cell] each."""

    share: Tensor | None
    """None: 1."""
    found: Tensor
    target: Tensor
    changed: Tensor
    """Without what others give."""


class Trace(NamedTuple):
    before: Tensor
    """[row, pos, cell]"""
    steps: Sequence[Moved]
    sizes: Tensor | None
    """[row, pos, cell]: what changes are multiplied by as they are written; None: 1."""


NOTHING_READ = Trace(torch.empty(0), (), None)


class _Shape(NamedTuple):
    """Of every round, as of the largest that a row has there."""

    n_cells: Ints
    n_steps: Ints
    traits: Ints

    @classmethod
    def of(cls, rows: Sequence[RowTable]) -> _Shape:
        n_rounds = max(len(row.n_cells) for row in rows)
        n_cells, n_steps, traits = (np.zeros(n_rounds, np.int64) for _ in range(3))
        for row in rows:
            n = len(row.n_cells)
            np.maximum(n_cells[:n], row.n_cells, out=n_cells[:n])
            np.maximum(n_steps[:n], row.n_steps, out=n_steps[:n])
            np.bitwise_or(traits[:n], row.traits, out=traits[:n])
        return cls(n_cells, n_steps, traits)

    def have(self, trait: Trait) -> list[bool]:
        """Of every round."""
        return ((self.traits & trait) > 0).tolist()

    @property
    def first_step(self) -> Ints:
        """How many steps the rounds before have."""
        return self.n_steps.cumsum() - self.n_steps

    def cells(self, places: Places) -> Ints:
        """Their numbers among all cells."""
        return (self.n_cells.cumsum() - self.n_cells)[places.rounds] + places.cells

    def moves(self, places: Places) -> Ints:
        """Likewise, where a round has its cells as often as it has steps."""
        n_moves = self.n_cells * self.n_steps
        first = (n_moves.cumsum() - n_moves)[places.rounds]
        return first + places.steps * self.n_cells[places.rounds] + places.cells


class _Added:
    """A round of every row in which vectors are added everywhere."""

    n_cells = n_steps = 1

    def __init__(self, vectors: Tensor) -> None:
        """[row, 1, width]"""
        self.elsewhere: dict[Point, Tensor | None] = {}
        self._amount = vectors

    def change(self, hidden: Tensor, weights: Tensor | None, norm: Tensor | None) -> tuple[Tensor, Trace]:
        """[row, pos, width] -> what is added to it."""
        return self._amount.to(hidden.dtype), NOTHING_READ

    def told(self, trace: Trace, changed: Tensor) -> Tensor:
        """[row, pos, 1, 5]: nothing was read."""
        numbers = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0], device=changed.device)
        return numbers.expand(*changed.shape[:2], 1, N_TOLD)

    def read_elsewhere(self, point: Point, hidden: Tensor) -> Tensor:
        raise AssertionError(point)


class _Round:
    """One group of every row."""

    def __init__(self, vectors: Tensor, tables: Mapping[Point | None, GaugeTable], steps: Sequence[_Step]) -> None:
        """vectors: [row, cell, width]. tables: by where they are read, with numbers of all cells, of which the others
        stay 0; None for the place that is edited."""
        self.n_cells, self.n_steps = vectors.shape[1], len(steps)
        self._vectors = vectors
        self._tables = tables
        self._steps = steps
        self.elsewhere: dict[Point, Tensor | None] = {point: None for point in tables if point is not None}
        """[row, pos, cell] of numbers that are read there, in the pass under way."""

    def change(self, hidden: Tensor, weights: Tensor | None, norm: Tensor | None) -> tuple[Tensor, Trace]:
        """[row, pos, width] -> what is added to it. norm: [row, pos, 1], where doses need it."""
        before = numbers = self._read(hidden)
        here = self._tables.get(None)
        sizes = here.sizes(hidden) if here is not None and here.is_normalised else None
        steps: list[Moved] = []
        for step in self._steps:
            moved, numbers = step(numbers, weights, norm, sizes)
            steps.append(moved)
        change = numbers - before
        written = change if sizes is None else change * sizes
        return torch.bmm(written, self._vectors).to(hidden.dtype), Trace(before, steps, sizes)

    def told(self, trace: Trace, changed: Tensor) -> Tensor:
        """After all edits of the point, which made `changed`, [row, pos, width] -> [row, pos, step × cell, 5]."""
        after = self._read(changed)
        sizes = 1.0 if trace.sizes is None else trace.sizes
        found = [(one.share, trace.before, one.target, after, (one.changed - one.found) * sizes) for one in trace.steps]
        return torch.cat([torch.stack([_ones(share, after), *others], -1) for share, *others in found], 2)

    def read_elsewhere(self, point: Point, hidden: Tensor) -> Tensor:
        """[row, pos, width] of another point -> [row, pos, cell]"""
        return self._tables[point](hidden)

    def _read(self, hidden: Tensor) -> Tensor:
        """Every cell's number, read here or shown before. [row, pos, width] -> [row, pos, cell]"""
        here = self._tables.get(None)
        parts = [] if here is None else [here(hidden)]
        for point, shown in self.elsewhere.items():
            assert shown is not None, f"nothing was shown of {point.name}"
            parts.append(shown)
        if not parts:
            return hidden.new_zeros(*hidden.shape[:2], self.n_cells, dtype=torch.float32)
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class _Step:
    """At most one move of every cell."""

    def __init__(
        self,
        moves: Tensor,
        columns: Tensor | None,
        gives: Tensor | None,
        *,
        has_doses: bool,
        has_bounds: bool,
        is_limited: bool,
    ) -> None:
        """moves: [6, row, 1, cell] as STAYS. columns: [row, 1, cell], of the weights. gives: [row, cell, cell], 1 where
        the first gives to the second."""
        self._alpha, self._beta, self._lo, self._hi, is_dose, self._limit = moves.unbind()
        """[row, 1, cell]; the last is the largest change, by the norm of what is there."""
        self._is_dose = is_dose > 0 if has_doses else None
        self._has_bounds, self._is_limited = has_bounds, is_limited
        self._columns = columns
        self._gives = gives

    def __call__(
        self, numbers: Tensor, weights: Tensor | None, norm: Tensor | None, sizes: Tensor | None
    ) -> tuple[Moved, Tensor]:
        """[row, pos, cell] -> what is done to them, and what they are then. sizes: as `Trace.sizes`."""
        beta, lo, hi = self._beta, self._lo, self._hi
        if self._is_dose is not None:
            assert norm is not None
            beta, lo, hi = (torch.where(self._is_dose & one.isfinite(), one * norm, one) for one in (beta, lo, hi))
        target = self._alpha * numbers + beta
        if self._has_bounds:
            target = torch.minimum(torch.maximum(target, lo), hi)
        share, given, changed = None, numbers, target
        if weights is not None:
            assert self._columns is not None
            share = weights.gather(2, self._columns.expand(*weights.shape[:2], -1))
            given = numbers * share
            changed = torch.where(share > 0, torch.lerp(numbers, target, share), numbers)
        if self._is_limited:
            assert norm is not None
            fits = self._limit * norm / (1.0 if sizes is None else sizes) / (changed - numbers).abs()
            changed = torch.where(fits < 1, numbers + fits * (changed - numbers), changed)
            given = torch.where(fits < 1, fits * given, given)
        moved = Moved(share, numbers, target, changed)
        return moved, changed if self._gives is None else changed + torch.bmm(given, self._gives)


def _ones(share: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if share is None else share


Rows = Sequence[tuple[int, RowTable]]
"""Those that have edits here, with their numbers."""


def _rounds(n_rows: int, rows: Rows, shape: _Shape, *, is_weighted: bool) -> Sequence[_Added | _Round]:
    """Tensors over all rounds, of which each has views."""
    n_cells = shape.n_cells.tolist()
    parts = [(row, shape.cells(table.cells), table.vectors) for row, table in rows]
    vectors = _joined(n_rows, sum(n_cells), parts)
    of_rounds = vectors.split(n_cells, 1)
    if not any(acts := shape.have(Trait.ACTS)):
        return [_Added(of) for of in of_rounds]
    tables = _tables(n_rows, rows, shape, vectors)
    steps = _steps(n_rows, rows, shape, is_weighted=is_weighted)
    return [
        _Round(of, tables[n], steps[first : first + n_steps]) if acts[n] else _Added(of)
        for n, (of, first, n_steps) in enumerate(zip(of_rounds, shape.first_step, shape.n_steps, strict=True))
    ]


def _tables(n_rows: int, rows: Rows, shape: _Shape, vectors: Tensor) -> Sequence[dict[Point | None, GaugeTable]]:
    """Of every round, by where it is read. vectors: [row, cell, width], along which it is written."""
    n_cells = shape.n_cells.tolist()
    tables: list[dict[Point | None, GaugeTable]] = [{} for _ in n_cells]
    reads_features = shape.have(Trait.READS_FEATURES)
    divided = {norm: shape.have(trait) for norm, trait in BY_NORM.items()}
    for point in sorted({one for _, table in rows for one in table.reads}, key=lambda one: (one is not None, one)):
        own = [(row, *table.reads[point]) for row, table in rows if point in table.reads]
        at = {row: shape.cells(places) for row, places, _ in own}
        are_vectors = len(own) == len(rows) and all(table.reads_its_vectors for _, table in rows)
        parts = [(row, at[row], gauges.columns) for row, _, gauges in own]
        columns = vectors if are_vectors else _joined(n_rows, sum(n_cells), parts)
        numbers = _joined(n_rows, sum(n_cells), [(row, at[row], gauges.numbers) for row, _, gauges in own])
        views = list(zip(columns.split(n_cells, 1), numbers.split(n_cells, 1), strict=True))
        for n in np.unique(np.concatenate([places.rounds for _, places, _ in own])).tolist():
            used = [norm for norm, of_rounds in divided.items() if of_rounds[n]]
            tables[n][point] = GaugeTable(Gauges(*views[n]), used, are_directions=not reads_features[n])
    return tables


def _steps(n_rows: int, rows: Rows, shape: _Shape, *, is_weighted: bool) -> list[_Step]:
    """Of every round its steps, one round after the other."""
    device = rows[0][1].vectors.device
    sizes = shape.n_cells.repeat(shape.n_steps).tolist()
    at = {row: shape.moves(table.moves) for row, table in rows}
    blank = torch.tensor(STAYS, device=device)
    moves = _joined(n_rows, sum(sizes), [(row, at[row], table.steps) for row, table in rows], blank)
    of_moves = moves.movedim(2, 0)[:, :, None].split(sizes, 3)
    of_columns: Sequence[Tensor | None] = [None] * len(sizes)
    if is_weighted:
        columns = [(row, at[row], torch.from_numpy(table.columns).to(device)) for row, table in rows]
        of_columns = _joined(n_rows, sum(sizes), columns)[:, None].split(sizes, 2)
    gives: dict[int, Tensor] = {}
    for row, table in rows:
        for number, step, cell, other in table.gifts:
            at_step = int(shape.first_step[number]) + step
            square = gives.setdefault(at_step, torch.zeros(n_rows, sizes[at_step], sizes[at_step]))
            square[row, cell, other] = 1.0
    of_rounds = np.array([shape.have(one) for one in (Trait.HAS_DOSES, Trait.HAS_BOUNDS, Trait.IS_LIMITED)])
    has = of_rounds.repeat(shape.n_steps, axis=1).T.tolist()
    return [
        _Step(
            of_moves[n],
            of_columns[n],
            gives[n].to(device) if n in gives else None,
            has_doses=has[n][0],
            has_bounds=has[n][1],
            is_limited=has[n][2],
        )
        for n in range(len(sizes))
    ]


def _joined(n_rows: int, n: int, parts: Sequence[tuple[int, Ints, Tensor]], blank: Tensor | None = None) -> Tensor:
    """[row, n, ...]: the part of every row at these places of it, and `blank`, or zeros, at all others."""
    like = parts[0][2]
    made = like.new_empty(n_rows, n, *like.shape[1:])
    for row in set(range(n_rows)) - {row for row, at, _ in parts if len(at) == n}:
        made[row] = 0 if blank is None else blank
    for row, at, part in parts:
        is_in_order = np.array_equal(at, np.arange(len(at)))
        made[row, slice(len(at)) if is_in_order else torch.from_numpy(at).to(part.device)] = part
    return made
