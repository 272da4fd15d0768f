"""Numbers read while rows run: on the hidden states that pass anyway, before and behind what edits them.

Equal readings are made once for all that want them, and the host reads once for all. A row may be read for several that
begin alike: what one does not have of its edits does not act there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.edits.record import EditRecord
from neuronpedia_inference.engine.hooks import Edit
from neuronpedia_inference.engine.protocol import Reading, RowSpec
from neuronpedia_inference.points import Point

Piece = tuple[int, int, int]
"""Row of the pass, and its positions from the first to the one behind the last."""


@dataclass(eq=False)
class _Group:
    """Readers that want the same reading at the same point, on the same side of its edits."""

    point: Point
    is_before: bool
    reading: Reading
    proves: bool
    readers: list[int] = field(default_factory=list)
    pieces: dict[Piece, int] = field(default_factory=dict)
    """What is read in the pass under way, each once, and where its numbers begin."""
    found: Tensor | None = None
    """[pos of all pieces, n_numbers], of the pass under way."""


class Reads:
    """What the rows of a batch are read for. Readers that do not watch take no part."""

    def __init__(self, readers: Sequence[RowSpec], rows: Sequence[int] | None = None) -> None:
        """rows: of every reader the row that it reads; each its own where there is none."""
        self._readers = readers
        self._rows = range(len(readers)) if rows is None else rows
        self._groups: dict[Hashable, _Group] = {}
        self._of_reader: list[list[_Group]] = [self._joined(reader, spec) for reader, spec in enumerate(readers)]
        self._read_from = [spec.read_from for spec in readers]
        self._first: int | None = None
        self._spans: Sequence[range] = ()
        """Of every reader, which positions of the pass under way are read."""
        self.edits = EditRecord(
            {reader: spec.edits for reader, spec in enumerate(readers) if spec.tells_edits}, self._rows
        )

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
        """A pass begins, of which so many positions are each reader's own.

        first: where in the prompts it begins; None behind them.
        """
        self._first = first
        skipped = [0 if first is None else max(0, before - first) for before in self._read_from]
        self._spans = [range(min(skip, count), count) for skip, count in zip(skipped, counts, strict=True)]
        self.edits.begin()
        for group in self._groups.values():
            group.found, group.pieces = None, {}
            n_positions = 0
            for piece in (self._piece(reader, group) for reader in group.readers):
                if piece not in group.pieces and piece[1] < piece[2]:
                    group.pieces[piece] = n_positions
                    n_positions += piece[2] - piece[1]

    def take(self) -> list[Numbers | None]:
        """Of every reader, [pos, n] as in `RowStep.numbers`; None of those that do not watch, or had no position."""
        told = {reader: self.edits.taken(reader, self._spans[reader]) for reader in self.edits.readers}
        groups = [group for group in self._groups.values() if group.found is not None]
        tensors = [*told.values(), *(group.found for group in groups if group.found is not None)]
        flat = _on_host(torch.cat([one.flatten() for one in tensors])) if tensors else np.empty(0, np.float32)
        ends = np.cumsum([one.numel() for one in tensors])
        arrays = [part.reshape(one.shape) for part, one in zip(np.split(flat, ends[:-1]), tensors, strict=False)]
        of_told = dict(zip(told, arrays, strict=False))
        of_group = {id(group): array for group, array in zip(groups, arrays[len(told) :], strict=True)}
        return [self._numbers(reader, of_told, of_group) for reader in range(len(self._readers))]

    def _numbers(self, reader: int, told: Mapping[int, Numbers], found: Mapping[int, Numbers]) -> Numbers | None:
        """told: by reader. found: by group."""
        span = self._spans[reader]
        if not span:
            return None
        parts = [told[reader]] if reader in told else []
        for group in self._of_reader[reader]:
            piece = self._piece(reader, group)
            n_read = piece[2] - piece[1]
            unread = np.zeros((len(span) - n_read, group.reading.n_numbers), np.float32)
            first = group.pieces[piece] if n_read else 0
            read = found[id(group)][first : first + n_read] if n_read else unread[:0]
            parts.append(np.concatenate([unread, read]) if len(unread) else read)
        return np.concatenate(parts, axis=1) if parts else None

    def _piece(self, reader: int, group: _Group) -> Piece:
        span = self._spans[reader]
        begins = span.start
        if group.proves and self._first is not None:
            begins = min(span.stop, max(begins, self._acts_from[reader] - self._first))
        return self._rows[reader], begins, span.stop

    @cached_property
    def _acts_from(self) -> list[int]:
        """Of every reader."""
        return [spec.acts_from for spec in self._readers]

    def _at(self, point: Point, *, is_before: bool | None = None) -> list[_Group]:
        """Both sides unless one is named."""
        groups = (group for group in self._groups.values() if group.point == point)
        return [group for group in groups if is_before is None or group.is_before is is_before]

    def _joined(self, reader: int, spec: RowSpec) -> list[_Group]:
        groups: list[_Group] = []
        for watch, is_before in spec.readings:
            key = (watch.point, is_before, watch.proves, watch.reading.key)
            group = self._groups.setdefault(key, _Group(watch.point, is_before, watch.reading, watch.proves))
            if reader not in group.readers:
                group.readers.append(reader)
            groups.append(group)
        return groups

    def _read(self, groups: Sequence[_Group], hidden: Tensor) -> None:
        for group in groups:
            if group.pieces:
                group.found = group.reading(_positions(hidden.flatten(2), list(group.pieces)))


def _positions(hidden: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """[row, pos, width] -> [pos of these pieces, width]"""
    if hidden.shape[1] == 1:
        return hidden[:, 0] if len(pieces) == len(hidden) else torch.cat([hidden[row] for row, *_ in pieces])
    return torch.cat([hidden[row, first:behind] for row, first, behind in pieces])


def _on_host(numbers: Tensor) -> Numbers:
    """The copy, for which the host waits until the pass is done."""
    return numbers.cpu().numpy()
