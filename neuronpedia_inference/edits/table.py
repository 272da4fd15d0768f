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

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from neuronpedia_inference.edits.gauges import GaugeTable, norms
from neuronpedia_inference.edits.groups import Cell, Group, Kind, Move, groups_of, length_of
from neuronpedia_inference.edits.plan import N_TOLD, STAYS
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.points import Point

Columns = Sequence[Mapping[RowEdit, int]]
"""Of every row: which column of the weights belongs to an edit."""


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

    def __init__(self, rows: Sequence[Sequence[RowEdit]], columns: Columns | None = None) -> None:
        """`rows`: the edits of each row, in the order of its request; at least one row has one.

        columns: None where no edit of theirs is ever weighted.
        """
        self._needs_norm = any(edit.is_dose or edit.is_limited for edits in rows for edit in edits)
        rounds = zip_longest(*map(groups_of, rows), fillvalue=NO_GROUP)
        self._rounds = [_round(groups, columns) for groups in rounds]

    def places(self, row: int) -> Mapping[RowEdit, int]:
        """Of a row's edits, among what a recorder is told."""
        found: dict[RowEdit, int] = {}
        first = 0
        for one in self._rounds:
            for of in one.groups[row].found:
                found[of.edit] = first + of.step * one.n_cells + of.cell
            first += one.n_steps * one.n_cells
        return found

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


NO_GROUP = Group(Kind.ADDITIONS, steps=[[]])


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


class _Added:
    """A group of every row in which vectors are added everywhere."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.elsewhere: dict[Point, Tensor | None] = {}
        self.groups, self.n_cells, self.n_steps = groups, 1, 1
        vectors = [group.cells[0].vector if group.cells else None for group in groups]
        self._amount = _stack(vectors)

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

    def __init__(self, groups: Sequence[Group], columns: Columns | None) -> None:
        self.n_cells = n_cells = max(len(group.cells) for group in groups)
        self.n_steps = n_steps = max(len(group.steps) for group in groups)
        vectors = [cell.vector if cell else None for group in groups for cell in _padded(group.cells, n_cells)]
        self._vectors = _stack(vectors)[:, 0].unflatten(0, (len(groups), n_cells))
        """[row, cell, width]"""
        self.groups = groups
        points = {cell.elsewhere for group in groups for cell in group.cells}
        self._tables = {point: _reads(groups, n_cells, point) for point in points}
        self.elsewhere: dict[Point, Tensor | None] = {point: None for point in points if point is not None}
        """[row, pos, cell] of numbers that are read there, in the pass under way."""
        steps = [[group.steps[n] if n < len(group.steps) else [] for group in groups] for n in range(n_steps)]
        self._steps = [_Step(moves, n_cells, columns, self._vectors.device) for moves in steps]

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
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class _Step:
    """At most one move of every cell."""

    def __init__(
        self, moves: Sequence[Sequence[Move]], n_cells: int, columns: Columns | None, device: torch.device
    ) -> None:
        steps = [[STAYS] * n_cells for _ in moves]
        doses = [[False] * n_cells for _ in moves]
        most = [[math.inf] * n_cells for _ in moves]
        lengths: list[list[Tensor | None]] = [[None] * n_cells for _ in moves]
        places = [[0] * n_cells for _ in moves]
        gives = [[[0.0] * n_cells for _ in range(n_cells)] for _ in moves]
        gives_some = False
        for row, of_row in enumerate(moves):
            for move in of_row:
                steps[row][move.cell] = move.step
                doses[row][move.cell] = move.edit.is_dose
                if move.edit.is_limited:
                    most[row][move.cell] = move.edit.most
                    lengths[row][move.cell] = length_of(move.edit)
                places[row][move.cell] = 0 if columns is None else columns[row][move.edit]
                if move.gives_to is not None:
                    gives[row][move.cell][move.gives_to] = 1.0
                    gives_some = True
        numbers = torch.tensor(steps, dtype=torch.float32, device=device)[:, None]
        self._alpha, self._beta, self._lo, self._hi = numbers.unbind(-1)
        """[row, 1, cell]"""
        self._is_dose = torch.tensor(doses, device=device)[:, None]
        self._has_doses = any(map(any, doses))
        self._places = torch.tensor(places, device=device)[:, None]
        self._gives = torch.tensor(gives, device=device) if gives_some else None
        self._limit = None if all(one is None for of in lengths for one in of) else _limit(most, lengths, device)
        """[row, 1, cell]: the largest change, by the norm of what is there."""

    def __call__(
        self, numbers: Tensor, weights: Tensor | None, norm: Tensor | None, sizes: Tensor | None
    ) -> tuple[Moved, Tensor]:
        """[row, pos, cell] -> what is done to them, and what they are then. sizes: as `Trace.sizes`."""
        beta, lo, hi = self._beta, self._lo, self._hi
        if self._has_doses:
            assert norm is not None
            beta, lo, hi = (torch.where(self._is_dose & one.isfinite(), one * norm, one) for one in (beta, lo, hi))
        target = torch.minimum(torch.maximum(self._alpha * numbers + beta, lo), hi)
        share, given, changed = None, numbers, target
        if weights is not None:
            share = weights.gather(2, self._places.expand(*weights.shape[:2], -1))
            given = numbers * share
            changed = torch.where(share > 0, torch.lerp(numbers, target, share), numbers)
        if self._limit is not None:
            assert norm is not None
            fits = self._limit * norm / (1.0 if sizes is None else sizes) / (changed - numbers).abs()
            changed = torch.where(fits < 1, numbers + fits * (changed - numbers), changed)
            given = torch.where(fits < 1, fits * given, given)
        moved = Moved(share, numbers, target, changed)
        return moved, changed if self._gives is None else changed + torch.bmm(given, self._gives)


def _ones(share: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if share is None else share


def _limit(most: Sequence[Sequence[float]], lengths: Sequence[Sequence[Tensor | None]], device: torch.device) -> Tensor:
    """[row, 1, cell]: how much each number may change by the norm of what is there; infinite where it may by any."""
    one = torch.ones(1, device=device)
    rows = [torch.cat([one if length is None else length for length in of]) for of in lengths]
    return (torch.tensor(most, device=device) / torch.stack(rows))[:, None]


def _round(groups: Sequence[Group], columns: Columns | None) -> _Added | _Round:
    return _Added(groups) if all(group.is_plain_addition for group in groups) else _Round(groups, columns)


def _reads(groups: Sequence[Group], n_cells: int, point: Point | None) -> GaugeTable:
    """Of the cells that are read at this point; the others stay 0."""
    cells = [_padded(group.cells, n_cells) for group in groups]
    rows = [[one.gauge if one is not None and one.elsewhere == point else None for one in row] for row in cells]
    return GaugeTable(rows)


def _padded(cells: Sequence[Cell], n_cells: int) -> Sequence[Cell | None]:
    return [*cells, *[None] * (n_cells - len(cells))]


def _stack(vectors: Sequence[Tensor | None]) -> Tensor:
    """Vectors or None -> [row, 1, width], zeros for None."""
    like = next(vector for vector in vectors if vector is not None)
    return torch.stack([torch.zeros_like(like) if vector is None else vector for vector in vectors])[:, None]
