"""What edits install in a module tree for the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from neuronpedia_inference.edits.table import EditTable, Recorder
from neuronpedia_inference.engine.decoder import Changes
from neuronpedia_inference.engine.hooks import Edit
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.engine.reads import Reads
from neuronpedia_inference.engine.where import Passing, Weights, begun, made_of
from neuronpedia_inference.points import ATTN_OUT, RESID_MID, RESID_PRE, Point


def steering_edits(rows: Sequence[RowSpec], passing: Passing | None = None, reads: Reads | None = None) -> Changes:
    """What to install for these rows, in the order in which a block reaches it.

    Of rows that have not begun, what their edits need is made here. passing: needed where edits of these rows act on
    some positions only. `reads` are taken around what edits, and told
    what edits find and do.
    """
    begun_rows = [begun(row) for row in rows]
    made = [made_of(row) for row in begun_rows]
    weights = Weights(begun_rows, passing)
    watches = weights.watches()
    reads = reads or Reads(())
    edited = {point for one in made for point in one.tables}
    changes: list[tuple[Point, Edit]] = []
    shown: list[tuple[Point, Edit]] = []
    for point in sorted(edited | watches.keys() | reads.points, key=lambda point: point.reached):
        if point in watches:  # before anything is edited there
            changes += _at(point, watches[point])
        if point in edited:
            table = EditTable([one.tables.get(point) for one in made], is_weighted=not weights.are_even)
            shown += table.elsewhere.items()
            change = _change(table, point, weights, reads.edits.of(table))
            changes += _at(point, reads.around(point, change) if point in reads.points else change)
        elif point in reads.points:
            changes.append((point, reads.reader(point)))
    return [*changes, *shown]


def _change(table: EditTable, point: Point, weights: Weights, record: Recorder | None) -> Callable[[Tensor], Tensor]:
    return lambda hidden: table(hidden, weights.now(point, hidden.device), record)


def _at(point: Point, change: Edit) -> list[tuple[Point, Edit]]:
    """resid_mid is no tensor of its own in most models: it is the sum of resid_pre and attn_out, read by the MLP branch
    and carried on by the skip connection. What is added to it is added to attn_out, so both see it.
    """
    if point.place != RESID_MID:
        return [(point, change)]
    resid_pre: list[Tensor] = []

    def remember(tensor: Tensor) -> None:
        resid_pre[:] = [tensor]

    def edit(attn_out: Tensor) -> Tensor | None:
        mid = resid_pre[0] + attn_out
        changed = change(mid)
        return None if changed is None else attn_out + (changed - mid)

    return [(Point(point.layer, RESID_PRE), remember), (Point(point.layer, ATTN_OUT), edit)]
