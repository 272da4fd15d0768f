"""A row's edits at one point as groups of numbers, and what becomes of each number, step by step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from neuronpedia_inference.edits.gauges import norms, unit
from neuronpedia_inference.edits.plan import Do, Step
from neuronpedia_inference.edits.rows import FeatureGauge, Gauge, RowEdit
from neuronpedia_inference.points import Point


class Kind(Enum):
    ADDITIONS = auto()
    FEATURES = auto()
    DIRECTION = auto()

    @classmethod
    def of(cls, edit: RowEdit) -> Kind:
        if edit.do is Do.ADD:
            return cls.ADDITIONS
        return cls.DIRECTION if edit.feature is None else cls.FEATURES


@dataclass(eq=False)
class Cell:
    """One number, and the vector along which its change is written."""

    vector: Tensor
    """d: [width], float32"""
    gauge: Gauge | None = None
    """None: it begins as 0."""
    elsewhere: Point | None = None
    """Where it is read; None for the place where it is written."""
    n_steps: int = 0
    """Steps up to the last that touches it."""


@dataclass(eq=False)
class Move:
    """What one edit does to one cell."""

    cell: int
    edit: RowEdit
    step: Step
    gives_to: int | None = None
    """Of a swap: the cell that gets what was here."""


class Found(NamedTuple):
    """Where what an edit finds and does is found among the numbers of a group."""

    edit: RowEdit
    step: int
    cell: int


class Written(NamedTuple):
    """What edits of one place write where their number changes by 1."""

    along: Tensor
    """[edit, width], float32"""
    others: dict[int, Tensor]
    """By the number of an edit that swaps: along what it gives to. [width]"""
    lengths: Tensor
    """[edit]: the norm of the whole."""


@dataclass(eq=False)
class Group:
    """Numbers that are read from the same h, and whose changes are written together."""

    kind: Kind
    cells: list[Cell] = field(default_factory=list)
    steps: list[list[Move]] = field(default_factory=list)
    """One after the other; within a step a cell is touched once at the most."""
    found: list[Found] = field(default_factory=list)
    """Every edit."""
    _known: dict[Hashable, int] = field(default_factory=dict)
    """The cell of a feature, whose edits act on one number, and of additions under the same conditions."""

    @property
    def is_plain_addition(self) -> bool:
        """Whether it adds one vector, whatever passes and wherever that is."""
        return self.kind is Kind.ADDITIONS and all(move.edit.is_plain_addition for move in self.steps[0])

    def add(self, edit: RowEdit, along: Tensor, gives_along: Tensor | None) -> None:
        """One edit more, with what it writes: [width] each."""
        if self.kind is Kind.ADDITIONS:
            self._add_vector(edit, along)
            return
        cell = self._cell(along, edit.feature)
        other = None if gives_along is None else self._cell(gives_along, edit.other_feature)
        touched = [self.cells[one] for one in (cell, other) if one is not None]
        at = max(one.n_steps for one in touched)
        for one in touched:
            one.n_steps = at + 1
        self._move(at, Move(cell, edit, edit.step, other))

    def _add_vector(self, edit: RowEdit, vector: Tensor) -> None:
        """Additions under the same conditions are one: their sum does not depend on where they are."""
        alike = edit if edit.is_limited else (edit.place, edit.is_dose)
        place = self._known.setdefault(alike, len(self.cells))
        if place == len(self.cells):
            self.cells.append(Cell(vector))
            self._move(0, Move(place, edit, Step(alpha=0.0, beta=1.0)))
        else:
            self.cells[place].vector = self.cells[place].vector + vector
            self.found.append(Found(edit, 0, place))

    def _cell(self, along: Tensor, feature: FeatureGauge | None) -> int:
        """A feature has one; every direction has its own."""
        if feature is None:
            self.cells.append(Cell(along, Gauge(along)))
            return len(self.cells) - 1
        place = self._known.setdefault(feature.key, len(self.cells))
        if place == len(self.cells):
            self.cells.append(Cell(along, feature.gauge, feature.elsewhere))
        return place

    def _move(self, at: int, move: Move) -> None:
        if len(self.steps) == at:
            self.steps.append([])
        self.steps[at].append(move)
        self.found.append(Found(move.edit, at, move.cell))


def groups_of(edits: Sequence[RowEdit], written: Written) -> list[Group]:
    """Of one row at one point, in order. All that transcoders do is one group, where the first of them stands."""
    groups: list[Group] = []
    of_transcoders: Group | None = None
    for number, (edit, along) in enumerate(zip(edits, written.along, strict=True)):
        kind = Kind.of(edit)
        is_of_transcoder = edit.feature is not None and edit.feature.elsewhere is not None
        open_group = of_transcoders if is_of_transcoder else None
        if open_group is None and groups and groups[-1].kind is kind is not Kind.DIRECTION:
            open_group = groups[-1]
        if open_group is None:
            open_group = Group(kind)
            groups.append(open_group)
        open_group.add(edit, along, written.others.get(number))
        if of_transcoders is None and any(read is not None and read.elsewhere for read in edit.reads):
            of_transcoders = open_group
    return groups


def written(edits: Sequence[RowEdit]) -> Written:
    """Of edits at one point: c·v of what adds, v̂ of a direction, the decoder row of a feature."""
    swaps = [number for number, edit in enumerate(edits) if edit.other is not None]
    along = _along(edits, [edit.vector for edit in edits])
    if not swaps:
        return Written(along, {}, norms(along)[:, 0])
    others = _along([edits[n] for n in swaps], [edits[n].other for n in swaps])
    whole = along.clone()
    whole[swaps] = others - along[swaps]
    return Written(along, dict(zip(swaps, others, strict=True)), norms(whole)[:, 0])


def _along(edits: Sequence[RowEdit], vectors: Sequence[Tensor | None]) -> Tensor:
    """[edit, width]"""
    stacked = torch.stack([vector.float() for vector in vectors if vector is not None])
    is_addition = [edit.do is Do.ADD for edit in edits]
    are_units = [edit.is_dose if adds else edit.feature is None for edit, adds in zip(edits, is_addition, strict=True)]
    amounts = [edit.amount if adds else 1.0 for edit, adds in zip(edits, is_addition, strict=True)]
    device = stacked.device
    found = torch.where(torch.tensor(are_units, device=device)[:, None], unit(stacked), stacked)
    return torch.tensor(amounts, dtype=torch.float32, device=device)[:, None] * found
