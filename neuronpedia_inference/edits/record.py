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
    """Of the pass under way. A position's numbers are, edit by edit in the order of the row: share, before, target and
    after as `table.Recorder` has them (of additions only the share, else 0), and the dose: the norm of what the edit
    writes, by that of what is there."""

    def __init__(self, edits: Mapping[int, Sequence[RowEdit]]) -> None:
        """edits: of the rows that want to be told."""
        self._edits = {row: of for row, of in edits.items() if of}
        self._parts: dict[int, list[tuple[Sequence[RowEdit], Tensor]]] = {}

    def __bool__(self) -> bool:
        return bool(self._edits)

    @property
    def rows(self) -> Sequence[int]:
        return list(self._edits)

    def begin(self) -> None:
        """A pass begins."""
        self._parts = {row: [] for row in self._edits}

    def of(self, table: EditTable) -> Recorder | None:
        """What this table tells; None where nobody wants to know."""
        takers = [_Taker(row, table) for row in self._edits if row in table.rows]
        if not takers:
            return None

        def record(found: Tensor, norm: Tensor) -> None:
            for taker in takers:
                self._parts[taker.row].append((taker.edits, taker.take(found, norm)))

        return record

    def taken(self, row: int, span: range) -> Tensor:
        """[pos, edit × 5], float32: of these positions of the pass."""
        parts = self._parts[row]
        there = {edit: place for place, edit in enumerate(edit for edits, _ in parts for edit in edits)}
        numbers = torch.cat([part for _, part in parts], 1)
        order = torch.tensor([there[edit] for edit in self._edits[row]], device=numbers.device)
        return numbers[span.start : span.stop, order].flatten(1)


class _Taker:
    """One row's edits at one point."""

    def __init__(self, row: int, table: EditTable) -> None:
        of_row = table.rows[row]
        device = of_row.lengths.device
        self.row = row
        self.edits = of_row.edits
        self._lengths = of_row.lengths
        self._places = torch.from_numpy(table.places(row)).to(device)
        means = [[1.0] + [float(edit.do is not Do.ADD)] * (_CHANGE - 1) for edit in self.edits]
        self._means = torch.tensor(means, device=device)

    def take(self, found: Tensor, norm: Tensor) -> Tensor:
        """[row, pos, place, 5] and [row, pos, 1] -> [pos, edit, 5] of this row."""
        numbers = found[self.row][:, self._places]
        written = numbers[..., _CHANGE].abs() * self._lengths
        # At a state of zeros every dose is infinite, which no answer could hold.
        dose = torch.where(written > 0, written / norm[self.row], 0.0).clamp(max=torch.finfo(torch.float32).max)
        return torch.cat([numbers[..., :_CHANGE] * self._means, dose[..., None]], -1)
