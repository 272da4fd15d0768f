"""Which strength a sweep suggests."""

from __future__ import annotations

import pytest

from neuronpedia_inference.operations.suggesting import MOST_LOST, MOST_REPEATED, Mean, suggested


def means(*rows: tuple[float, float, float, float]) -> list[Mean]:
    return [Mean(*row) for row in rows]


@pytest.mark.parametrize(
    ("found", "strength"),
    [
        ([], None),
        (means((10, 0, 0, 1), (20, 0.5, 0, 4), (40, 1.4, 0, 3)), 20),
        (means((10, 0, 0, 1), (20, 0.5, 0, 4), (40, 1.4, 0, 9), (80, 1.6, 0, 20)), 40),
        (means((10, 0, 0, 1), (20, -1, 0.26, 20)), 10),
        (means((10, 2, 0, 1), (20, 0, 0.9, 20)), None),
        (means((10, 0, 0, 0), (20, 0, 0, 0)), None),
        (means((20, 0, 0, 3), (-10, 0, 0, 3), (40, 0, 0, 3)), -10),
        (means((10, MOST_LOST, MOST_REPEATED, 1)), 10),
        (means((10, float("inf"), 1.0, 1)), None),
    ],
)
def test_it_has_the_largest_effect_of_those_that_hold(found: list[Mean], strength: float | None) -> None:
    assert suggested(found) == strength
    assert suggested(found[::-1]) == strength
