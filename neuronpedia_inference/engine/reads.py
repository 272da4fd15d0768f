"""Numbers read while rows run: on the hidden states that pass anyway, before and behind what edits them.

Equal readings are made once for all rows that want them, and the host reads once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.edits.record import EditRecord
from neuronpedia_inference.engine.hooks import Edit
from neuronpedia_inference.engine.protocol import Reading, RowSpec
from neuronpedia_inference.points import Point


@dataclass(eq=False)
class _Group:
    """Rows that want the same reading at the same point, on the same side of its edits."""

    point: Point
    is_before: bool
    reading: Reading
    rows: list[int]
    found: Tensor | None = None
    """[pos of all its rows, n_numbers], of the pass under way."""


class Reads:
    """What the rows of a batch read. Rows that do not watch take no part."""

    def __init__(self, rows: Sequence[RowSpec]) -> None:
        self._n_rows = len(rows)
        self._groups: dict[Hashable, _Group] = {}
        self._of_row: list[list[_Group]] = [
            [self._join(row, *wanted) for wanted in _wanted(spec)] for row, spec in enumerate(rows)
        ]
        self._read_from = [spec.read_from for spec in rows]
        self._spans: Sequence[range] = ()
        """Of every row, which positions of the pass under way are read."""
        self.edits = EditRecord({row: spec.edits for row, spec in enumerate(rows) if spec.tells_edits})

    def __bool__(self) -> bool:
        return bool(self._groups) or bool(self.edits)

    @property
    def points(self) -> set[Point]:
        return {group.point for group in self._groups.values()}

    def around(self, point: Point, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What edits a point, with what reads before and behind it."""
        before = self._at(point, is_before=True)
        behind = self._at(point, is_before=False)

        def edit(hidden: Tensor) -> Tensor:
            self._read(before, hidden)
            changed = change(hidden)
            self._read(behind, changed)
            return changed

        return edit

    def reader(self, point: Point) -> Edit:
        """Of a point that nothing edits."""
        return lambda hidden: self._read(self._at(point), hidden)

    def begin(self, counts: Sequence[int], first: int | None = None) -> None:
        """A pass begins, whose first so many positions are each row's own.

        first: where in the rows' prompts it begins; None behind them.
        """
        skipped = [0 if first is None else max(0, before - first) for before in self._read_from]
        self._spans = [range(min(skip, count), count) for skip, count in zip(skipped, counts, strict=True)]
        self.edits.begin()
        for group in self._groups.values():
            group.found = None

    def take(self) -> list[Numbers | None]:
        """Of every row, [pos, n] as in `RowStep.numbers`; None of rows that do not watch, or had no position."""
        groups = [group for group in self._groups.values() if group.found is not None]
        told = {row: self.edits.taken(row, self._spans[row]) for row in self.edits.rows if self._spans[row]}
        found = [*told.values(), *(group.found for group in groups if group.found is not None)]
        if not found:
            return [None] * self._n_rows
        flat = _on_host(torch.cat([one.flatten() for one in found]))
        parts: list[list[Numbers]] = [[] for _ in range(self._n_rows)]
        of_groups: dict[tuple[int, int], Numbers] = {}
        first = 0

        def taken(row: int, n_numbers: int) -> Numbers:
            nonlocal first
            n = len(self._spans[row]) * n_numbers
            first += n
            return flat[first - n : first].reshape(-1, n_numbers)

        for row, numbers in told.items():
            parts[row].append(taken(row, numbers.shape[1]))
        for group in groups:
            for row in group.rows:
                of_groups[id(group), row] = taken(row, group.reading.n_numbers)
        for row, of_row in enumerate(self._of_row):
            parts[row] += [of_groups[id(group), row] for group in of_row if self._spans[row]]
        return [np.concatenate(of_row, axis=1) if of_row else None for of_row in parts]

    def _at(self, point: Point, *, is_before: bool | None = None) -> list[_Group]:
        """Both sides unless one is named."""
        groups = (group for group in self._groups.values() if group.point == point)
        return [group for group in groups if is_before is None or group.is_before is is_before]

    def _join(self, row: int, point: Point, is_before: bool, reading: Reading) -> _Group:
        group = self._groups.setdefault((point, is_before, reading.key), _Group(point, is_before, reading, []))
        if row not in group.rows:
            group.rows.append(row)
        return group

    def _read(self, groups: Sequence[_Group], hidden: Tensor) -> None:
        for group in groups:
            mine = [row for row in group.rows if self._spans[row]]
            if mine:
                group.found = group.reading(self._positions(hidden.flatten(2), mine))

    def _positions(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """[row, pos, width] -> [pos of these rows, width]"""
        if hidden.shape[1] == 1:
            return hidden[:, 0] if len(rows) == len(hidden) else torch.cat([hidden[row] for row in rows])
        return torch.cat([hidden[row, self._spans[row].start : self._spans[row].stop] for row in rows])


def _wanted(spec: RowSpec) -> Iterator[tuple[Point, bool, Reading]]:
    for watch in spec.watches:
        if watch.before:
            yield watch.point, True, watch.reading
        yield watch.point, False, watch.reading


def _on_host(numbers: Tensor) -> Numbers:
    """The copy, for which the host waits until the pass is done."""
    return numbers.cpu().numpy()
