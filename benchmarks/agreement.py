"""Whether a contender did the same work as the floor. What does not agree is not timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

TOLERANCE = 1e-3
"""Of the largest value of the same prompt or feature."""
SHOWN = 24


def difference(kind: str, answer: Any, floor: Any) -> str | None:
    """What is different, in words; None where both say the same."""
    match kind:
        case "OneFeature":
            return _first(_values(f"prompt {n}", *pair) for n, pair in _paired(answer, floor))
        case "AllFeatures":
            return _features(answer, floor)
        case "Generate":
            texts = ([text for one in side for text in one] for side in (answer, floor))
            return _first(_text(f"text {n}", *pair) for n, pair in _paired(*texts))
    return _text("the token", answer, floor)


def largest_difference(answer: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Between two answers to the same `OneFeature`."""
    rows = zip(answer, other, strict=True)
    return max(abs(a - b) for one, two in rows for a, b in zip(one, two, strict=True))


def _paired(answer: Sequence[Any], floor: Sequence[Any]) -> Iterator[tuple[int, tuple[Any, Any]]]:
    return enumerate(zip(answer, floor, strict=True), start=1)


def _first(found: Iterator[str | None]) -> str | None:
    return next((one for one in found if one is not None), None)


def _values(where: str, answer: Sequence[float], floor: Sequence[float]) -> str | None:
    if len(answer) != len(floor):
        return f"{where}: {len(answer)} values instead of {len(floor)}"
    largest = max(map(abs, floor))
    # Zeros would agree with anything that finds nothing.
    assert largest > 0, f"{where}: the floor finds nothing, so there is nothing to compare"
    # Not `max`, which passes over a NaN.
    off = [abs(a - b) for a, b in zip(answer, floor, strict=True) if not abs(a - b) <= TOLERANCE * largest]
    return f"{where}: off by {off[0]:.3g}, where the largest value is {largest:.3g}" if off else None


def _features(answer: Sequence[Any], floor: Sequence[Any]) -> str | None:
    """The same features with the same values; equal ones may stand in any order, unequal ones may not."""
    values, wanted = ({(layer, index): row for layer, index, row in side} for side in (answer, floor))
    if values.keys() != wanted.keys():
        return f"features {sorted(values.keys() - wanted.keys())} instead of {sorted(wanted.keys() - values.keys())}"
    peaks = [max(row) for _, _, row in answer]
    if any(later > earlier for earlier, later in pairwise(peaks)):
        return "the features are not in order"
    return _first(_values(f"feature {name}", values[name], wanted[name]) for name in wanted)


def _text(where: str, answer: str, floor: str) -> str | None:
    if answer == floor:
        return None
    same = next(
        (n for n, (a, b) in enumerate(zip(answer, floor, strict=False)) if a != b), min(len(answer), len(floor))
    )
    here, there = answer[same : same + SHOWN], floor[same : same + SHOWN]
    return f"{where} differs from character {same}: {here!r} instead of {there!r}"
