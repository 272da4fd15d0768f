"""What edits find and do, of the rows that want to be told: five numbers of every edit at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from neuronpedia_inference.edits.plan import N_TOLD, Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.edits.table import EditTable, Recorder

_CHANGE = N_TOLD - 1


class EditRecord:
    """Of the pass under way. A position's numbers are, edit by edit in the order of the reader: share, before, target
    and after as `table.Recorder` has them (of additions only the share, else 0), and the dose: the norm of what the
    edit writes, by that of what is there. All are 0 where the edit does not act."""

    def __init__(self, edits: Mapping[int, Sequence[RowEdit]], rows: Sequence[int] | None = None) -> None:
        """edits: of the readers that want to be told. rows: of every reader, the row of the pass that it reads; where
        that is another's, with these edits and perhaps others, edits that it lacks do not act."""
        self._edits = {reader: of for reader, of in edits.items() if of}
        self._row_of = {reader: reader if rows is None else rows[reader] for reader in self._edits}
        self._parts: dict[int, list[tuple[Sequence[RowEdit], Tensor]]] = {}

    def __bool__(self) -> bool:
        return bool(self._edits)

    @property
    def readers(self) -> Sequence[int]:
        return list(self._edits)

    def begin(self) -> None:
        """A pass begins."""
        self._parts = {reader: [] for reader in self._edits}

    def of(self, table: EditTable) -> Recorder | None:
        """What this table tells; None where nobody wants to know."""
        takers: list[tuple[int, _Taker]] = []
        for reader, edits in self._edits.items():
            row = self._row_of[reader]
            of_row = table.rows.get(row)
            own = [] if of_row is None else [place for place, edit in enumerate(of_row.edits) if edit in edits]
            if own:
                takers.append((reader, _Taker(row, table, own)))
        if not takers:
            return None

        def record(found: Tensor, norm: Tensor) -> None:
            for reader, taker in takers:
                self._parts[reader].append((taker.edits, taker.take(found, norm)))

        return record

    def taken(self, reader: int, span: range) -> Tensor:
        """[pos, edit × 5], float32: of these positions of the pass."""
        parts, edits = self._parts[reader], self._edits[reader]
        nothing = torch.zeros(len(span), 1, N_TOLD, device=edits[0].vector.device)
        numbers = torch.cat([*(part[span.start : span.stop] for _, part in parts), nothing], 1)
        there = {edit: place for place, edit in enumerate(edit for some, _ in parts for edit in some)}
        order = torch.tensor([there.get(edit, len(there)) for edit in edits], device=numbers.device)
        return numbers[:, order].flatten(1)


class _Taker:
    """Some of a row's edits at one point."""

    def __init__(self, row: int, table: EditTable, own: Sequence[int]) -> None:
        of_row = table.rows[row]
        device = of_row.lengths.device
        self.row = row
        self.edits = [of_row.edits[place] for place in own]
        self._lengths = of_row.lengths[list(own)]
        self._places = torch.from_numpy(table.places(row)[list(own)]).to(device)
        means = [[1.0] + [float(edit.do is not Do.ADD)] * (_CHANGE - 1) for edit in self.edits]
        self._means = torch.tensor(means, device=device)

    def take(self, found: Tensor, norm: Tensor) -> Tensor:
        """[row, pos, place, 5] and [row, pos, 1] -> [pos, edit, 5] of this row."""
        numbers = found[self.row][:, self._places]
        written = numbers[..., _CHANGE].abs() * self._lengths
        # At a state of zeros every dose is infinite, which no answer could hold.
        dose = torch.where(written > 0, written / norm[self.row], 0.0).clamp(max=torch.finfo(torch.float32).max)
        told = torch.cat([numbers[..., :_CHANGE] * self._means, dose[..., None]], -1)
        return torch.where(numbers[..., :1] > 0, told, 0.0)
