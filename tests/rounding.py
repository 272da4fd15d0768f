"""What the same computation may differ by when it runs in another order: in a batch, on another processor, once more.

A float32 carries 24 bits, so one operation is off by up to 6e-8 of its result. A product over k terms that is added up
in another order differs by about √k of that: 2.4e-6 for k = 1536, the widest of the embedded model. Its 30 blocks hold
7 products each, whose differences add up like a random walk: √210 of it, 3.5e-5 of the largest value there. CLOSE is
three times as much. The small models (k of at most 128, 3 blocks) come to √128 · √21 · 6e-8 = 3e-6; APART is three
times that, relative to the largest logit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

CLOSE = 1e-4
APART = 1e-5
DECIMAL = re.compile(r"\d+\.\d+")
LARGEST_LOGIT = 50.0
"""Of the embedded model, rounded up."""


def differences(one: Any, other: Any) -> list[str]:
    """Where two JSON answers differ by more than rounding; everything but floats must be equal.

    Floats may differ by CLOSE of the largest float in either answer.
    """
    return list(_differences(one, other, "answer", max((abs(x) for x in _floats([one, other])), default=0.0)))


def drawn_differences(one: str, other: str) -> list[str]:
    """Where two texts with numbers in them differ by more than rounding; everything but decimals must be equal.

    Decimals may differ by CLOSE of themselves, and by one in the last place written.
    """
    if DECIMAL.sub("#", one) != DECIMAL.sub("#", other):
        place = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        return [f"{one[max(0, place - 80) : place + 80]!r} and {other[max(0, place - 80) : place + 80]!r}"]
    pairs = zip(DECIMAL.findall(one), DECIMAL.findall(other), strict=True)
    return [f"{mine} and {theirs}" for mine, theirs in pairs if not _is_written_alike(mine, theirs)]


def _is_written_alike(one: str, other: str) -> bool:
    last_place = 10.0 ** -min(len(text.partition(".")[2]) for text in (one, other))
    return math.isclose(float(one), float(other), rel_tol=CLOSE, abs_tol=1.01 * last_place)


def begins(expected: str, logprobs: list[dict[str, Any]]) -> bool:
    """Whether a greedy text begins one that another machine wrote, up to a choice that rounding decides.

    logprobs: of the text's tokens, with at least two candidates each.
    """
    said = ""
    for one in logprobs:
        said += one["token"]
        if not expected.startswith(said):
            return _is_tie(one)
    return True


def same_choices(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two greedy texts are equal up to a choice that rounding decides, after which they may be what they like.

    one, other: the log-probabilities of an answer, with at least two candidates each.
    """
    for mine, theirs in zip(one, other, strict=False):
        if mine["token"] != theirs["token"]:
            return _is_tie(mine)
    return len(one) == len(other)


def _is_tie(token: dict[str, Any]) -> bool:
    best, second = (candidate["logprob"] for candidate in token["top_logprobs"][:2])
    return best - second <= CLOSE * LARGEST_LOGIT


def _differences(one: Any, other: Any, place: str, scale: float) -> Iterator[str]:
    if isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE * scale):
            yield f"{place}: {one} and {other}"
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from _differences(one[key], other[key], f"{place}.{key}", scale)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, f"{place}[{number}]", scale)
    elif one != other:
        yield f"{place}: {str(one)[:200]} and {str(other)[:200]}"


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _floats(each)
