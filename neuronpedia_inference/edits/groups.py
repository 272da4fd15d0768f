"""A row's edits at one point as groups of numbers, and what becomes of each number, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

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
    key: tuple[str, int] | None = None
    """Of a feature, whose edits act on one number."""
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


@dataclass(eq=False)
class Found:
    """Where what an edit finds and does is found among the numbers of a group."""

    edit: RowEdit
    step: int
    cell: int


@dataclass(eq=False)
class Group:
    """Numbers that are read from the same h, and whose changes are written together."""

    kind: Kind
    cells: list[Cell] = field(default_factory=list)
    steps: list[list[Move]] = field(default_factory=list)
    """One after the other; within a step a cell is touched once at the most."""
    found: list[Found] = field(default_factory=list)
    """Every edit."""

    @property
    def is_of_transcoders(self) -> bool:
        return any(cell.elsewhere is not None for cell in self.cells)

    @property
    def is_plain_addition(self) -> bool:
        """Whether it adds one vector, whatever passes and wherever that is."""
        return self.kind is Kind.ADDITIONS and all(move.edit.is_plain_addition for move in self.steps[0])

    def add(self, edit: RowEdit) -> None:
        """One edit more."""
        if self.kind is Kind.ADDITIONS:
            self._add_vector(edit)
            return
        cell = self._cell(edit.vector, edit.feature)
        other = None if edit.other is None else self._cell(edit.other, edit.other_feature)
        touched = [self.cells[one] for one in (cell, other) if one is not None]
        at = max(one.n_steps for one in touched)
        for one in touched:
            one.n_steps = at + 1
        self._move(at, Move(cell, edit, edit.step, other))

    def _add_vector(self, edit: RowEdit) -> None:
        """Additions under the same conditions are one: their sum does not depend on where they are."""
        vector = edit.amount * (unit(edit.vector) if edit.is_dose else edit.vector.float())
        for move in self.steps[0] if self.steps else ():
            is_alike = (move.edit.place, move.edit.is_dose) == (edit.place, edit.is_dose)
            if is_alike and not (move.edit.is_limited or edit.is_limited):
                self.cells[move.cell].vector = self.cells[move.cell].vector + vector
                self.found.append(Found(edit, 0, move.cell))
                return
        self.cells.append(Cell(vector))
        self._move(0, Move(len(self.cells) - 1, edit, Step(alpha=0.0, beta=1.0)))

    def _cell(self, vector: Tensor, feature: FeatureGauge | None) -> int:
        """A feature has one; every direction has its own."""
        if feature is None:
            direction = unit(vector)
            self.cells.append(Cell(direction, Gauge(direction)))
            return len(self.cells) - 1
        known = [number for number, cell in enumerate(self.cells) if cell.key == feature.key]
        if not known:
            self.cells.append(Cell(vector.float(), feature.gauge, feature.elsewhere, feature.key))
        return known[0] if known else len(self.cells) - 1

    def _move(self, at: int, move: Move) -> None:
        if len(self.steps) == at:
            self.steps.append([])
        self.steps[at].append(move)
        self.found.append(Found(move.edit, at, move.cell))


def length_of(edit: RowEdit) -> Tensor:
    """[1]: the norm of what is written where the edit's number changes by 1."""
    vector, other = edit.vector.float(), edit.other
    if edit.do is Do.ADD:
        return norms(edit.amount * (unit(vector) if edit.is_dose else vector))
    if edit.feature is None:
        vector, other = unit(vector), None if other is None else unit(other)
    return norms(vector if other is None else other.float() - vector)


def groups_of(edits: Sequence[RowEdit]) -> list[Group]:
    """Of one row at one point, in order. All that transcoders do is one group, where the first of them stands."""
    groups: list[Group] = []
    for edit in edits:
        kind = Kind.of(edit)
        is_of_transcoder = edit.feature is not None and edit.feature.elsewhere is not None
        open_group = next((group for group in groups if group.is_of_transcoders), None) if is_of_transcoder else None
        if open_group is None and groups and groups[-1].kind is kind is not Kind.DIRECTION:
            open_group = groups[-1]
        if open_group is None:
            open_group = Group(kind)
            groups.append(open_group)
        open_group.add(edit)
    return groups
