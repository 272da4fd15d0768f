"""What is made of a row's edits once, when it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from neuronpedia_inference.edits.row_table import RowTable
from neuronpedia_inference.edits.rows import Gate, RowEdit, Trigger
from neuronpedia_inference.edits.select import Selection
from neuronpedia_inference.points import Point

Place = tuple[Selection, Gate | None]


@dataclass(frozen=True, eq=False)
class MadeEdits:
    """What is made of a row's edits once, so that rows that join and leave have nothing made anew."""

    tables: Mapping[Point, RowTable]
    triggers: Sequence[Trigger]
    """What they wait for."""
    fired: Tensor | None
    """[trigger, position] of bool: what has been seen of that; None where they wait for nothing."""
    places: Sequence[Place]
    """Where edits act and triggers look: the row's columns of the weights."""
    columns: Mapping[RowEdit, int]
    """Which of them belongs to an edit."""

    @property
    def is_even(self) -> bool:
        """Whether each acts everywhere, wholly."""
        return all(on.is_everything and when is None for on, when in self.places)

    @classmethod
    def of(cls, edits: Sequence[RowEdit], triggers: Sequence[Trigger], n_positions: int) -> Self:
        """triggers: what the edits wait for. n_positions: how long the text may become."""
        places: dict[Place, int] = {}
        for one in (*edits, *triggers):
            places.setdefault(place_of(one), len(places))
        columns = {edit: places[edit.place] for edit in edits}
        by_point: dict[Point, list[RowEdit]] = {}
        for edit in edits:
            by_point.setdefault(edit.point, []).append(edit)
        tables = {point: RowTable(some, columns) for point, some in by_point.items()}
        fired = None
        if triggers:
            device = edits[0].vector.device
            fired = torch.zeros(len(triggers), n_positions, dtype=torch.bool, device=device)
        return cls(tables, triggers, fired, list(places), columns)


def place_of(one: RowEdit | Trigger) -> Place:
    """Of an edit, or where a trigger is looked at."""
    return one.place if isinstance(one, RowEdit) else (one.on, None)
