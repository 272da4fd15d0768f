"""One row's edits at one point as tensors, made once. What rows do together is put together from these (`table.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag, auto
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronpedia_inference.edits.gauges import Gauges
from neuronpedia_inference.edits.groups import Cell, Group, Move, groups_of, written
from neuronpedia_inference.edits.rows import Norm, RowEdit
from neuronpedia_inference.points import Point

Ints = NDArray[np.int64]

STAYS = (1.0, 0.0, -math.inf, math.inf, 0.0, math.inf)
"""Of a number that nothing is done to: alpha, beta, lo, hi, is_dose and limit."""


class Trait(IntFlag):
    """Of one round of edits."""

    ACTS = auto()
    """It is more than vectors that are added everywhere."""
    READS_FEATURES = auto()
    BY_CONSTANT = auto()
    BY_LAYER = auto()
    """Some of what it reads is divided by such a norm."""
    HAS_BOUNDS = auto()
    HAS_DOSES = auto()
    IS_LIMITED = auto()


BY_NORM = {Norm.NONE: Trait(0), Norm.CONSTANT: Trait.BY_CONSTANT, Norm.LAYER: Trait.BY_LAYER}


@dataclass(frozen=True, eq=False)
class Places:
    """Where numbers are: round, step and cell of each."""

    rounds: Ints
    steps: Ints
    cells: Ints

    @classmethod
    def of(cls, found: Sequence[Sequence[int]]) -> Places:
        return cls(*np.array(found, np.int64).reshape(-1, 3).T)


class RowTable:
    """Its rounds are the groups of its edits, one after the other.

    What only adds needs little of it; the rest is made when it is first asked for.
    """

    def __init__(self, edits: Sequence[RowEdit], columns: Mapping[RowEdit, int] | None = None) -> None:
        """edits: at least one, all at one point. columns: of the weights, which belongs to an edit; None where none of
        these edits is ever weighted."""
        wrote = written(edits)
        self._groups = groups = groups_of(edits, wrote)
        self._column_of = columns
        self.edits = edits
        self.lengths = wrote.lengths
        """[edit]: the norm of what is written where an edit's number changes by 1."""
        self.n_cells = np.array([len(group.cells) for group in groups])
        self.n_steps = np.array([len(group.steps) for group in groups])
        self.traits = np.array([_traits(group) for group in groups])
        self.needs_norm = bool((self.traits & (Trait.HAS_DOSES | Trait.IS_LIMITED)).any())
        self._cells = [(n, 0, place, cell) for n, group in enumerate(groups) for place, cell in enumerate(group.cells)]
        self.cells = Places.of([at for *at, _ in self._cells])
        self.vectors = torch.stack([cell.vector for *_, cell in self._cells])
        """[cell, width], float32"""

    @cached_property
    def reads_its_vectors(self) -> bool:
        """Whether every number is the size of what passes along the vector that its change is written along."""
        return all(cell.gauge is not None and cell.gauge.is_direction for *_, cell in self._cells)

    @cached_property
    def reads(self) -> Mapping[Point | None, tuple[Places, Gauges]]:
        """By point, None for the edits' own: which cells are read there, and how."""
        points = {cell.elsewhere for *_, cell in self._cells if cell.gauge is not None}
        return {point: self._read_at(self._cells, point) for point in points}

    @cached_property
    def _moves(self) -> Sequence[tuple[int, int, Move]]:
        """With round and step."""
        groups = enumerate(self._groups)
        return [(n, at, move) for n, group in groups for at, step in enumerate(group.steps) for move in step]

    @cached_property
    def moves(self) -> Places:
        return Places.of([(n, at, move.cell) for n, at, move in self._moves])

    @cached_property
    def steps(self) -> Tensor:
        """[move, 6] as STAYS, float32"""
        numbers = {edit: number for number, edit in enumerate(self.edits)}
        return _steps([move for *_, move in self._moves], numbers, self.lengths)

    @cached_property
    def columns(self) -> Ints:
        """[move]: columns of the weights"""
        column_of = self._column_of
        return np.array([0 if column_of is None else column_of[move.edit] for *_, move in self._moves])

    @cached_property
    def gifts(self) -> Sequence[tuple[int, int, int, int]]:
        """Round, step, the cell that gives and the one that gets."""
        return [(n, at, move.cell, move.gives_to) for n, at, move in self._moves if move.gives_to is not None]

    @cached_property
    def found(self) -> Places:
        """Of every edit, where what it finds and does is told."""
        found = {one.edit: (n, one.step, one.cell) for n, group in enumerate(self._groups) for one in group.found}
        return Places.of([found[edit] for edit in self.edits])

    def _read_at(self, cells: Sequence[tuple[int, int, int, Cell]], point: Point | None) -> tuple[Places, Gauges]:
        """At least one cell is read there."""
        here = [(at, cell.gauge) for *at, cell in cells if cell.gauge is not None and cell.elsewhere == point]
        columns = self.vectors if self.reads_its_vectors else torch.stack([gauge.column for _, gauge in here])
        return Places.of([at for at, _ in here]), Gauges.of([gauge for _, gauge in here], columns)

    @cached_property
    def added_when_generated(self) -> Tensor:
        """[width]: of edits that add vectors, the same at every generated position, their sum there."""
        weights = [edit.amount * (edit.on.weight_when_generated or 0.0) for edit in self.edits]
        vectors = torch.stack([edit.vector.float() for edit in self.edits])
        return torch.tensor(weights, dtype=torch.float32, device=vectors.device) @ vectors


def _traits(group: Group) -> Trait:
    moves = [move for step in group.steps for move in step]
    gauges = [cell.gauge for cell in group.cells if cell.gauge is not None]
    found = Trait(0) if group.is_plain_addition else Trait.ACTS
    for gauge in gauges:
        found |= BY_NORM[gauge.norm]
    for trait, is_so in (
        (Trait.READS_FEATURES, any(not gauge.is_direction for gauge in gauges)),
        (Trait.HAS_BOUNDS, any(move.step.lo > -math.inf or move.step.hi < math.inf for move in moves)),
        (Trait.HAS_DOSES, any(move.edit.is_dose for move in moves)),
        (Trait.IS_LIMITED, any(move.edit.is_limited for move in moves)),
    ):
        found |= trait if is_so else Trait(0)
    return found


def _steps(moves: Sequence[Move], numbers: Mapping[RowEdit, int], lengths: Tensor) -> Tensor:
    """[move, 6]"""
    steps = [(*move.step, float(move.edit.is_dose), move.edit.most) for move in moves]
    found = torch.tensor(steps, dtype=torch.float32, device=lengths.device)
    found[:, -1] /= lengths[[numbers[move.edit] for move in moves]]
    return found
