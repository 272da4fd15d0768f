"""What edits did, from numbers written down by hand: the same whether they come at once or token by token."""

from __future__ import annotations

import numpy as np
import pytest

from neuronpedia_inference.domain import Tokens, Written
from neuronpedia_inference.edits.plan import Do, Edit, Feature, Fires
from neuronpedia_inference.edits.proof import Moment, Proof, ResolvedEdit, n_numbers
from neuronpedia_inference.edits.select import EVERYTHING, Phase, Selection

PROMPT = Tokens((5, 6), ("a", "b"), (False, False), has_bos=False)
FEATURE = Feature("1-res", 3)
GENERATED = Selection(phase=Phase.GENERATED)


def resolved(point: str, on: Selection = EVERYTHING, *, reads: bool = False, gated: bool = False) -> ResolvedEdit:
    when = Fires(FEATURE, 1.0) if gated else None
    return ResolvedEdit(Edit(Do.CLAMP if reads else Do.ADD, FEATURE, 1.0, when=when), point, 1.0, on, reads)


EDITS = (resolved("x", GENERATED), resolved("y", reads=True), resolved("x"), resolved("x", reads=True))
# At x: norm, three projections, one activation, before and after. At y: norm, projection, activation, likewise.
NUMBERS = np.array(
    [
        [2, 1, 1, 1, 7, 9, 3, 1, 1, 8, 4, 1, 0, 4, 1, 0],
        [2, 1, 1, 1, 7, 9, 3, 2, 1, 8, 4, 1, 0, 4, 3, 5],
        [2, 1, 1, 1, 7, 9, 3, 1, 1, 8, 4, 1, 0, 4, 2, 6],
        [8, 1, 1, 1, 7, 9, 5, 1, 1, 8, 4, 1, 0, 4, 1, 0],
    ],
    dtype=np.float32,
)


def add(proof: Proof, written: Written) -> None:
    for _ in proof.add(written):
        pass


def told(proof: Proof) -> list[tuple[Moment | None, Moment | None]]:
    return [(one.first, one.last) for one in map(proof.traced, range(len(proof.edits)))]


@pytest.mark.parametrize("in_front", [0, 3])
def test_the_first_and_the_last_token_where_it_was_moved(in_front: int) -> None:
    """in_front: numbers of what is watched."""
    assert n_numbers(EDITS) == NUMBERS.shape[1]
    proof = Proof(EDITS, PROMPT)
    watched = np.full((4, in_front), 77, np.float32)
    add(proof, Written(token_ids=(8, 9), tokens=("c", "d"), numbers=np.hstack([watched, NUMBERS])))
    assert told(proof) == [
        (Moment(2, "c", 1, 3, 2, None, None), Moment(3, "d", 1, 5, 8, None, None)),
        (Moment(1, "b", 1, 3, 4, 0, 5), Moment(2, "c", 1, 2, 4, 0, 6)),
        (Moment(1, "b", 1, 2, 2, None, None), Moment(1, "b", 1, 2, 2, None, None)),
        (None, None),
    ]
    first = proof.traced(0).first
    assert first is not None
    assert first.dose == 1.0
    assert proof.doses == [(2 / 2 + 4 / 8) / 2, (1 / 4 + 0) / 2, 0.0, 0.0], "means over the two generated tokens"


def test_it_does_not_matter_how_they_come() -> None:
    whole, by_token = Proof(EDITS, PROMPT), Proof(EDITS, PROMPT)
    add(whole, Written(token_ids=(8, 9), tokens=("c", "d"), numbers=NUMBERS))
    add(by_token, Written(token_ids=(8,), tokens=("c",), numbers=NUMBERS[:2]))
    add(by_token, Written(token_ids=(9,), tokens=("d",)))
    add(by_token, Written(numbers=NUMBERS[2:3]))
    add(by_token, Written(numbers=NUMBERS[3:]))
    assert told(by_token) == told(whole)


def test_of_a_condition_beside_other_edits_nothing_is_claimed() -> None:
    numbers = np.array([[2, 1, 1, 2, 3, 3]], dtype=np.float32)
    beside = Proof((resolved("x", gated=True), resolved("x")), PROMPT)
    add(beside, Written(numbers=numbers))
    gated, other = beside.traced(0), beside.traced(1)
    assert (gated.is_known, gated.first, other.is_known) == (False, None, True)
    assert other.first is not None
    alone = Proof((resolved("x", gated=True),), PROMPT)
    add(alone, Written(numbers=numbers[:, [0, 1, 3, 4]]))
    assert alone.traced(0).is_known
    assert alone.traced(0).first == Moment(0, "a", 1, 3, 2, None, None)


def test_a_row_without_edits_has_none() -> None:
    proof = Proof((), PROMPT)
    add(proof, Written(token_ids=(8,), tokens=("c",), numbers=None))
    assert list(proof.edits) == []
    assert n_numbers(()) == 0
