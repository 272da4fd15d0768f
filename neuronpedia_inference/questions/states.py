"""Questions about what passes inside the model, without any SAE: vectors at its points, and attention patterns.

As in `features`, the tensors are worked on where the reductions run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neuronpedia_inference.costs import BLOCK_ELEMENTS, SENDING_BYTES
from neuronpedia_inference.domain import Attended, Numbers, Positions, Precision, Tokens
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.errors import EngineFailed, InvalidRequest
from neuronpedia_inference.points import PATTERN, Point
from neuronpedia_inference.questions.checks import check_prompts
from neuronpedia_inference.questions.features import Steps
from neuronpedia_inference.questions.question import Places, Weights

if TYPE_CHECKING:
    from torch import Tensor

STATE_BYTES = 8
"""Of a number of an answer: in float32 on the device, and on the host."""
MOST_KEYS, LEAST_WEIGHT = 8, 0.005
"""Keys of a query that are shown, and what they weigh at least (contract 4.2)."""
ATTENDED_BYTES = 40
"""Of a key that is shown."""


@dataclass(frozen=True)
class States:
    """The vectors at points: [n, width] per prompt and point; n is 1 for `last` and `mean`."""

    prompts: Sequence[Tokens]
    at: Sequence[Point]
    positions: Positions | Sequence[Sequence[int]]
    """Of all prompts alike, or the places of each."""
    n_numbers: int
    """Of the answer."""
    precision: Precision = "float32"

    @property
    def points(self) -> set[Point]:
        return set(self.at)

    @property
    def n_bytes(self) -> int:
        return SENDING_BYTES + STATE_BYTES * self.n_numbers

    def check(self, places: Places, vocab_size: int) -> None:
        for point in self.at:
            places.check(point)
        check_prompts(self.prompts, vocab_size)
        for number, prompt in enumerate(self.prompts if self.positions == "mean" else ()):
            if all(prompt.is_special):
                raise InvalidRequest(f"Text {number} has no tokens beside special ones, so there is no mean over them.")

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[Mapping[Point, Numbers]]]:
        found: list[Mapping[Point, Numbers]] = []
        for number, (prompt, seen) in enumerate(zip(self.prompts, captured, strict=True)):
            states: dict[Point, Numbers] = {}
            for point in self.at:
                states[point] = _on_host(self._wanted(number, prompt, seen[point]), point, self.precision)
                yield None
            found.append(states)
        return found

    def _wanted(self, number: int, prompt: Tokens, hidden: Tensor) -> Tensor:
        """[pos, width] -> [n, width], float32"""
        match self.positions:
            case "all":
                return hidden.float()
            case "last":
                return hidden[-1:].float()
            case "mean":
                counted = [place for place, is_special in enumerate(prompt.is_special) if not is_special]
                return hidden[counted].float().mean(dim=0, keepdim=True)
            case places:
                return hidden[list(places[number])].float()


@dataclass(frozen=True)
class HeadPattern:
    """Where one attention head looks on one prompt."""

    prompt: Tokens
    layer: int
    head: int

    @property
    def prompts(self) -> Sequence[Tokens]:
        return (self.prompt,)

    @property
    def points(self) -> set[Point]:
        return {Point(self.layer, PATTERN)}

    @property
    def n_bytes(self) -> int:
        n = len(self.prompt)
        return SENDING_BYTES + ATTENDED_BYTES * min(MOST_KEYS, n) * n + 16 * max(n, min(BLOCK_ELEMENTS, n * n))

    def check(self, places: Places, vocab_size: int) -> None:
        for point in self.points:
            places.check(point)
        check_prompts(self.prompts, vocab_size)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[Attended]:
        from neuronpedia_inference.saes.order import stable_topk
        from neuronpedia_inference.saes.reduce import extremes

        [point], [seen] = self.points, captured
        if self.head >= len(seen[point]):
            raise InvalidRequest(f"Invalid head: {self.head}. Layer {self.layer} has {len(seen[point])}.")
        pattern = seen[point][self.head]
        n = len(pattern)
        parts: list[tuple[Numbers, Numbers, Numbers]] = []
        largest = 0.0
        at_once = max(1, BLOCK_ELEMENTS // n)
        for first in range(0, n, at_once):
            rows = pattern[first : first + at_once].float()
            if not bool(extremes(rows).isfinite().all()):
                raise _not_finite(point)
            behind = rows[max(0, 1 - first) :, 1:]
            largest = max(largest, float(behind.max())) if behind.numel() else largest
            strongest, keys = (one.cpu().numpy() for one in stable_topk(rows, min(MOST_KEYS, n)))
            parts.append(_shown(strongest, keys, first))
            yield None
        queries, keys, shown = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Attended(queries, keys, shown, largest)


def _shown(weights: Numbers, keys: Numbers, first: int) -> tuple[Numbers, Numbers, Numbers]:
    """Queries, keys and weights of what weighs enough: from [query, k] both, the first query being `first`."""
    order = np.argsort(keys, axis=1)
    keys, weights = (np.take_along_axis(column, order, axis=1) for column in (keys, weights))
    rows, columns = np.nonzero(weights >= LEAST_WEIGHT)
    return rows + first, keys[rows, columns], weights[rows, columns]


def _on_host(values: Tensor, point: Point, precision: Precision) -> Numbers:
    from neuronpedia_inference.saes.reduce import extremes, on_host

    ends = extremes(values)
    if not bool(ends.isfinite().all()):
        raise _not_finite(point)
    if precision == "float16":
        if not bool(ends.half().isfinite().all()):
            raise InvalidRequest(f"dtype: numbers at {point.name!r} are too large for float16. Ask for float32.")
        values = values.half()
    found = on_host(values)
    found.flags.writeable = False  # what is kept of the text for others may lie there
    return found


def _not_finite(point: Point) -> EngineFailed:
    return EngineFailed(f"The model gave a value that is not finite at {point.name!r}.")
