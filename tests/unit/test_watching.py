"""What was read is made into an answer while that is written, and not before: there may be millions of numbers."""

from __future__ import annotations

import numpy as np

from neuronpedia_inference.operations.rendering import json_pieces
from neuronpedia_inference.operations.watching import _Column


def test_an_item_is_made_when_it_is_written() -> None:
    made: list[float] = []

    def make(numbers: np.ndarray) -> float:
        made.append(float(numbers[0]))
        return made[-1]

    column = _Column(range(1, 2), make)
    column.add(np.arange(200.0).reshape(100, 2))
    newest = column.newest()
    column.add(None)
    assert made == []
    assert len(newest) == 100
    assert len(column.newest()) == 0
    wanted = "[" + ",".join(str(float(n)) for n in range(1, 200, 2)) + "]"
    assert b"".join(json_pieces(newest, "snake", omit_null=False)).decode() == wanted
    assert b"".join(json_pieces(column.all, "snake", omit_null=False)).decode() == wanted
    assert len(made) == 200
