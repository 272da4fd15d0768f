"""The yardstick of the other tests: it lets rounding pass, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rounding import begins, differences, drawn_differences, same_choices

ANSWER: dict[str, Any] = {"tokens": ["a", "b"], "rows": [{"index": 7, "values": [0.0, 34.0]}]}


@pytest.mark.parametrize(
    ("rows", "is_same"),
    [
        ([{"index": 7, "values": [0.0, 34.001]}], True),
        ([{"index": 7, "values": [0.001, 34.0]}], True),
        ([{"index": 7, "values": [0.01, 34.0]}], False),
        ([{"index": 7, "values": [0.0, 34.01]}], False),
        ([{"index": 8, "values": [0.0, 34.0]}], False),
        ([{"index": 7, "values": [0.0]}], False),
        ([{"index": 7, "values": None}], False),
    ],
)
def test_answers(rows: list[Any], is_same: bool) -> None:
    assert (differences(ANSWER, {**ANSWER, "rows": rows}) == []) == is_same


@pytest.mark.parametrize(
    ("text", "is_same"),
    [
        ("<td>34.02 of 7</td>", True),
        ("<td>34.01 of 7</td>", True),
        ("<td>34.0 of 7</td>", True),
        ("<td>34.04 of 7</td>", False),
        ("<td>34.02 of 8</td>", False),
        ("<td>34 of 7</td>", False),
        ("<th>34.02 of 7</td>", False),
    ],
)
def test_what_is_drawn(text: str, is_same: bool) -> None:
    assert (drawn_differences("<td>34.02 of 7</td>", text) == []) == is_same


def choice(token: str, gap: float) -> dict[str, Any]:
    return {"token": token, "top_logprobs": [{"token": "x", "logprob": -1.0}, {"token": "y", "logprob": -1.0 - gap}]}


def test_a_text_may_leave_the_expected_one_at_a_tie_only() -> None:
    clear, tie = 0.1, 0.001
    assert begins("xyz", [choice("x", clear), choice("y", clear)])
    assert not begins("xyz", [choice("x", clear), choice("z", clear)])
    assert begins("xyz", [choice("x", clear), choice("z", tie), choice("y", clear)])


def test_texts_may_part_at_a_tie_only() -> None:
    clear, tie = 0.1, 0.001
    assert same_choices([choice("x", clear)], [choice("x", clear)])
    assert not same_choices([choice("x", clear)], [choice("y", clear)])
    assert same_choices([choice("x", tie), choice("x", clear)], [choice("y", tie), choice("y", clear)])
    assert not same_choices([choice("x", clear)], [])
