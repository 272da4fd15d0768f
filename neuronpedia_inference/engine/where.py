"""Where edits act in the pass under way: selections, which are known before it runs, and conditions, which are not.

Whether a trigger has fired is kept by row and position. So how long a condition holds, rows that move, and a text that
is run again are all a question of which positions are looked at. A trigger that a pass reaches before the edit is known
at the edit's own position. One that it reaches later is known at the positions before, and in the prompt at none: what
it has seen there counts from the first generated token on. So a prompt that runs in pieces is edited like a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.edits.gauges import GaugeTable
from neuronpedia_inference.edits.made import MadeEdits, place_of
from neuronpedia_inference.edits.plan import Both, Condition, Either, Fires
from neuronpedia_inference.edits.rows import Gate, RowEdit, Trigger
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.points import Point


@dataclass(frozen=True, eq=False)
class Span:
    """The positions that one forward pass runs, as many of every row."""

    firsts: Sequence[int] = ()
    """[row]: where in its text a row's first one is."""
    ids: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    """[row, pos], on the host"""


@dataclass
class Passing:
    """The pass under way, for those who have to know what it runs."""

    span: Span = field(default_factory=Span)


def begun(row: RowSpec) -> RowSpec:
    """The row with what is made of its edits."""
    if row.made is not None:
        return row
    n_positions = len(row.prompt_ids) + row.sampling.max_new_tokens
    return replace(row, made=MadeEdits.of(row.edits, row.triggers, n_positions))


def made_of(row: RowSpec) -> MadeEdits:
    assert row.made is not None, "the row has not begun"
    return row.made


class Weights:
    """How much each position of the pass under way is edited."""

    def __init__(self, rows: Sequence[RowSpec], passing: Passing | None) -> None:
        """`rows` have begun. passing: needed where edits of these rows act on some positions only."""
        self._rows = rows
        self._passing = passing
        self._made = [made_of(row) for row in rows]
        self.are_even = all(made.is_even for made in self._made)
        """Whether all edits act everywhere, wholly."""
        self._span: Span | None = None
        self._weights: Tensor | None = None

    def now(self, point: Point, device: torch.device) -> Tensor | None:
        """[row, pos, column] for the edits of all rows at this point; None where all are 1."""
        if self.are_even:
            return None
        weights = self._selected(device)
        edits = [made.tables[point].edits if point in made.tables else () for made in self._made]
        gated = [(row, edit, edit.when) for row, of in enumerate(edits) for edit in of if edit.when is not None]
        if gated:
            weights = weights.clone()
        for row, edit, gate in gated:
            weights[row, :, self._made[row].columns[edit]] *= self._open(row, edit, gate)
        return weights

    def watches(self) -> Mapping[Point, Callable[[Tensor], None]]:
        """At every point where a trigger is read, what notes whether it fires."""
        points = {trigger.point for made in self._made for trigger in made.triggers}
        return {point: self._watch(point) for point in points}

    # Selections

    def _selected(self, device: torch.device) -> Tensor:
        """By selection alone, made once for all points of a pass."""
        span = self._passing_now()
        if span is not self._span or self._weights is None:
            self._span, self._weights = span, self._of_span(span).to(device)
        return self._weights

    def _passing_now(self) -> Span:
        assert self._passing is not None, "these edits need to know their positions"
        return self._passing.span

    def _of_span(self, span: Span) -> Tensor:
        ids = span.ids.numpy()
        weights = np.ones((*ids.shape, max(len(made.places) for made in self._made)), np.float32)
        for row, made in enumerate(self._made):
            at = np.arange(span.firsts[row], span.firsts[row] + ids.shape[1])
            for column, (on, _) in enumerate(made.places):
                weights[row, :, column] = on.weights(at, ids[row], self._rows[row].n_prompt)
        return torch.from_numpy(weights)

    # Conditions

    def _watch(self, point: Point) -> Callable[[Tensor], None]:
        here = [[one for one in made.triggers if one.point == point] for made in self._made]
        n_cells = max(map(len, here))
        table = GaugeTable.of([[one.gauge for one in of] + [None] * (n_cells - len(of)) for of in here])
        return partial(self._note, here, table)

    def _note(self, here: Sequence[Sequence[Trigger]], table: GaugeTable, hidden: Tensor) -> None:
        numbers = table(hidden.flatten(2))
        weights = self._selected(hidden.device)
        span = self._passing_now()
        for row, triggers in enumerate(here):
            made, first = self._made[row], span.firsts[row]
            for cell, one in enumerate(triggers):
                assert made.fired is not None, row
                size = numbers[row, :, cell]
                is_so = size < one.threshold if one.is_below else size > one.threshold
                is_so = is_so & (weights[row, :, made.places.index(place_of(one))] > 0)
                into = made.fired[made.triggers.index(one), first : first + len(is_so)]
                into.copy_(is_so[: len(into)])

    def _open(self, row: int, edit: RowEdit, gate: Gate) -> Tensor:
        """[pos] of bool: where the condition of an edit holds."""
        span = self._passing_now()
        first, n = span.firsts[row], span.ids.shape[1]
        n_prompt = self._rows[row].n_prompt
        found = self._holds(row, edit, gate, gate.condition)
        if any(_is_late(trigger, edit) for trigger in gate.triggers.values()) and first < n_prompt:
            found = found.clone()
            found[: n_prompt - first] = False
        assert len(found) == n, (len(found), n)
        return found

    def _holds(self, row: int, edit: RowEdit, gate: Gate, condition: Condition) -> Tensor:
        if isinstance(condition, Fires):
            return self._fired(row, gate.triggers[condition], condition.n_tokens, edit)
        if isinstance(condition, Both | Either):
            parts = torch.stack([self._holds(row, edit, gate, part) for part in condition.parts])
            return parts.all(0) if isinstance(condition, Both) else parts.any(0)
        return ~self._holds(row, edit, gate, condition.part)

    def _fired(self, row: int, trigger: Trigger, n_tokens: int | None, edit: RowEdit) -> Tensor:
        """[pos]: whether it has, in the last so many positions up to each, or in all."""
        span, made = self._passing_now(), self._made[row]
        assert made.fired is not None, row
        first, n = span.firsts[row], span.ids.shape[1]
        kept = made.fired[made.triggers.index(trigger), : first + n]
        n_before = torch.nn.functional.pad(kept.cumsum(0), (1, first + n - len(kept)))
        n_before[len(kept) + 1 :] = n_before[len(kept)]  # behind the text nothing fires
        ends = torch.arange(first, first + n, device=kept.device) + (0 if _is_late(trigger, edit) else 1)
        begins = torch.zeros_like(ends) if n_tokens is None else (ends - n_tokens).clamp(min=0)
        return n_before[ends] > n_before[begins]


def _is_late(trigger: Trigger, edit: RowEdit) -> bool:
    """Whether a pass reaches it after the edit has acted."""
    return trigger.point.reached > edit.point.reached
