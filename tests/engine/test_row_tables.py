"""What is made of a row's edits is made once; tables of rows that come and go are put together from that."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits import made as made_module
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.row_table import RowTable
from neuronpedia_inference.edits.table import EditTable
from neuronpedia_inference.engine import where
from neuronpedia_inference.engine.protocol import RowId, RowSpec
from tests.edits_by_hand import WIDTH, Hand, sae
from tests.engine.engines import engine

PLACE = "hook_resid_post"
DIRECTIONS = (Do.ADD, Do.ORTHOGONAL, Do.CAP, Do.FLOOR, Do.PROJECT_OUT, Do.SWAP)
FEATURES = (Do.ADD, Do.CLAMP, Do.SCALE, Do.AT_LEAST, Do.AT_MOST, Do.SWAP)
ROUNDING = 1e-5
"""Relative to the largest number: padding adds zeros to sums of 32 products of float32, in another order at most."""


def some(seed: int, n: int, *, most: float | None = None) -> list[Hand]:
    """Edits of all kinds in any order, some bounded."""
    drawn = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    of = sae("jumprelu", size=3.0)
    found = []
    for _ in range(n):
        vector, other = torch.randn(2, WIDTH, generator=generator)
        bound = {} if most is None or drawn.random() < 0.5 else {"most": most}
        if drawn.random() < 0.5:
            do = drawn.choice(DIRECTIONS)
            to = other if do is Do.SWAP else None
            found.append(Hand(do, 1, PLACE, 0.7, vector=vector, gives_to=to, **bound))  # pyright: ignore
        else:
            do, index = drawn.choice(FEATURES), drawn.randrange(6)
            to = 6 + index if do is Do.SWAP else None
            found.append(Hand(do, 1, PLACE, 1.5, of=of, index=index, gives_to=to, **bound))  # pyright: ignore
    return found


def states(seed: int) -> Tensor:
    return 3 * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))


def called(table: EditTable, given: Tensor) -> tuple[Tensor, Tensor]:
    """What becomes of [row, pos, width], and what is told of it."""
    told: list[Tensor] = []
    changed = table(given, None, lambda numbers, _: told.append(numbers))
    return changed, told[0]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())


@pytest.mark.parametrize("most", [None, 0.3])
def test_rows_of_any_edits_are_together_what_they_are_alone(most: float | None) -> None:
    """Rows of other lengths, other orders and none beside each other; what is told of each is its own too."""
    n_changed = 0
    for seed in range(8):
        rows = [RowTable([hand.resolved() for hand in some(seed + 10 * n, 1 + 3 * n, most=most)]) for n in range(4)]
        given = torch.stack([states(n) for n in range(5)])
        table = EditTable([rows[0], None, *rows[1:]])
        together, told = called(table, given)
        assert torch.equal(together[1], given[1]), "a row without edits"
        for row, of_row in zip((0, 2, 3, 4), rows, strict=True):
            alone = EditTable([of_row])
            (expected,), (told_alone,) = called(alone, given[row : row + 1])
            assert close(together[row], expected)
            n_changed += not torch.equal(expected, given[row])
            here, there = told[row][:, table.places(row)], told_alone[:, alone.places(0)]
            reads = [edit.do is not Do.ADD for edit in of_row.edits]
            assert close(here[..., [0, 4]], there[..., [0, 4]])
            assert not any(reads) or close(here[:, reads], there[:, reads])
    assert n_changed > 24, "of 32 rows some only bound what is small already"


def test_what_is_made_of_a_row_is_made_once_whoever_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[int] = Counter()

    def counted(edits: object, *args: object) -> RowTable:
        made[id(edits)] += 1
        return RowTable(edits, *args)  # pyright: ignore

    lane = engine("llama").lane
    monkeypatch.setattr(made_module, "RowTable", counted)
    edits = tuple(hand.resolved() for hand in some(3, 6))
    rows = [RowSpec((5, 6, 7, 8 + n), Sampling(30), edits) for n in range(3)]
    with torch.inference_mode():
        for n, row in enumerate(rows):
            lane.prefill([(RowId(0, n), row)])
            lane.decode()
        lane.park([RowId(0, 1)])
        lane.decode()
        lane.resume([RowId(0, 1)])
        lane.decode()
        lane.drop([RowId(0, 0)])
        lane.decode()
        lane.drop(lane.rows)
    assert sum(made.values()) == 3, "one for each row: all edit one place"
    other = replace(rows[0], edits=())
    assert where.begun(other).made is not None
    assert sum(made.values()) == 3, "nothing of a row without edits"
