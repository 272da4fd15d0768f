"""The promises that a run can confirm or break, as numbers computed from its medians."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.agreement import largest_difference
from benchmarks.cases import FLOOR, HTTP, IN_PROCESS


@dataclass(frozen=True)
class Promise:
    """The median of `above` divided by the median of `below` is at least, or at most, `bound`."""

    name: str
    what: str
    above: str
    below: str
    relation: Literal["at least", "at most"]
    bound: float
    below_floor: bool = False
    """The divisor is the floor's."""


PROMISES = (
    Promise("1", "8 steers at once, throughput", "steers_serial", "steers_together", "at least", 4.0),
    Promise("2", "16 features 8 at a time, throughput", "features_serial", "features_together", "at least", 2.0),
    Promise(
        "2 batch",
        "16 features 8 at a time, of plain Hugging Face's batch",
        "features_together",
        "features_together",
        "at most",
        0.65,
        True,
    ),
    Promise("2 long", "4 prompts of 500 tokens at once, time", "long_together", "long_serial", "at most", 1.05),
    Promise("3", "Feature at layer 10, of a full forward", "feature_10", "full_forward", "at most", 0.45, True),
    Promise("3 mid", "Feature at layer 15, of a full forward", "feature_15", "full_forward", "at most", 0.6, True),
    Promise("4", "STEERED and DEFAULT, of STEERED alone", "steered_default", "steered", "at most", 1.35),
    Promise("5", "First event beside 4 streams, of idle", "first_busy", "first_idle", "at most", 2.5),
)
SAME_NUMBERS = 1e-4
OURS = (HTTP, IN_PROCESS)

Medians = Mapping[str, Mapping[str, float]]
"""Milliseconds by case and contender."""
Answers = Mapping[tuple[str, str], Any]
"""By case and contender."""


def judged(medians: Medians, answers: Answers) -> Iterator[dict[str, Any]]:
    """One line per promise and door. A promise that could not be measured is not met."""
    for promise in PROMISES:
        for contender in OURS:
            if promise.name == "5" and contender != HTTP:
                continue
            yield _line(promise, medians, contender)
    for contender in OURS:
        yield _same_texts(answers, contender)
        yield _same_numbers(answers, contender)


def _line(promise: Promise, medians: Medians, contender: str) -> dict[str, Any]:
    value = _ratio(promise, medians, contender)
    met = value is not None and (value >= promise.bound if promise.relation == "at least" else value <= promise.bound)
    return {
        "promise": promise.name,
        "what": promise.what,
        "contender": contender,
        "value": value,
        "relation": promise.relation,
        "bound": promise.bound,
        "met": met,
        "plain": _ratio(promise, medians, FLOOR),
    }


def _ratio(promise: Promise, medians: Medians, contender: str) -> float | None:
    above = medians.get(promise.above, {}).get(contender)
    below = medians.get(promise.below, {}).get(FLOOR if promise.below_floor else contender)
    return None if above is None or below is None else round(above / below, 3)


def _same_texts(answers: Answers, contender: str) -> dict[str, Any]:
    alone, together = answers.get(("steers_serial", contender)), answers.get(("steers_together", contender))
    same = sum(a == b for a, b in zip(alone, together, strict=True)) if alone and together else None
    return _count("1 texts", "Greedy texts that are the same at once as alone, of 8", contender, same, "at least", 8)


def _same_numbers(answers: Answers, contender: str) -> dict[str, Any]:
    alone, together = answers.get(("features_serial", contender)), answers.get(("features_together", contender))
    off = largest_difference(alone, together) if alone and together else None
    what = "Largest difference of a value, 8 at a time against alone"
    return _count("2 numbers", what, contender, off, "at most", SAME_NUMBERS)


def _count(name: str, what: str, contender: str, value: float | None, relation: str, bound: float) -> dict[str, Any]:
    met = value is not None and (value >= bound if relation == "at least" else value <= bound)
    line = {"promise": name, "what": what, "contender": contender, "value": value}
    return {**line, "relation": relation, "bound": bound, "met": met, "plain": None}
