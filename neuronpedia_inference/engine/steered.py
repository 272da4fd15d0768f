"""What steering installs in a module tree for the rows of a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor

from neuronpedia_inference.engine.decoder import Changes
from neuronpedia_inference.engine.hooks import Edit
from neuronpedia_inference.engine.points import ATTN_OUT, RESID_MID, RESID_PRE, WRITABLE, Point
from neuronpedia_inference.engine.protocol import RowSpec, Steering
from neuronpedia_inference.engine.reads import Reads
from neuronpedia_inference.steering.apply import SteerTable

Mask = Callable[[], Tensor | None]
"""[row, pos] of bool for the pass under way: positions that steering leaves alone; None for none."""


def steering_edits(rows: Sequence[RowSpec], untouched: Mask = lambda: None, reads: Reads | None = None) -> Changes:
    """What to install for these rows, in the order in which a block reaches it; `reads` are taken around what edits.

    resid_mid is no tensor of its own in most models: it is the sum of resid_pre and attn_out, read by the MLP branch
    and carried on by the skip connection. What steering adds to it is added to attn_out, so both see it.
    """
    by_point: dict[Point, list[list[Steering]]] = defaultdict(lambda: [[] for _ in rows])
    for row, spec in enumerate(rows):
        for steering in spec.steering:
            by_point[steering.point][row].append(steering)
    changes: list[tuple[Point, Edit]] = []
    reads = reads or Reads(())
    for point in sorted(by_point.keys() | reads.points, key=_order):
        if point not in by_point:
            changes.append((point, reads.reader(point)))
            continue
        change = _change(SteerTable(by_point[point]), untouched)
        if point in reads.points:
            change = reads.around(point, change)
        if point.place == RESID_MID:
            changes += _edit_sum(point.layer, change)
        else:
            changes.append((point, change))
    return changes


def _order(point: Point) -> tuple[int, int]:
    """What is only read comes last in its layer: it is a tensor of its own."""
    return point.layer, WRITABLE.index(point.place) if point.place in WRITABLE else len(WRITABLE)


def _change(table: SteerTable, untouched: Mask) -> Callable[[Tensor], Tensor]:
    return lambda hidden: table(hidden, untouched())


def _edit_sum(layer: int, change: Callable[[Tensor], Tensor]) -> list[tuple[Point, Edit]]:
    resid_pre: list[Tensor] = []

    def remember(tensor: Tensor) -> None:
        resid_pre[:] = [tensor]

    def edit(attn_out: Tensor) -> Tensor:
        mid = resid_pre[0] + attn_out
        return attn_out + (change(mid) - mid)

    return [(Point(layer, RESID_PRE), remember), (Point(layer, ATTN_OUT), edit)]
