"""What passes inside the model, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuronpedia_inference.client.steering import Vector
from neuronpedia_inference.tensor_files import answer_in, read_tensors

if TYPE_CHECKING:
    from neuronpedia_inference.domain import Numbers

TEXTS_AT_ONCE = 16
"""Of one request."""


@dataclass(frozen=True)
class Captured:
    """The vectors of one text at points of the model: `captured["blocks.15.hook_resid_post"]` is [n, width] in float32;
    n is the number of tokens that were asked for, or 1."""

    tokens: tuple[str, ...]
    """All its tokens, as text."""
    token_ids: tuple[int, ...]
    is_special: tuple[bool, ...]
    positions: tuple[int, ...]
    """Which of them were read; of a mean, those it is over."""
    states: Mapping[str, Numbers]

    def __getitem__(self, point: str) -> Numbers:
        return self.states[point]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{point} {list(array.shape)}" for point, array in self.states.items())
        return f"Captured({len(self.tokens)} tokens, {shapes})"


def read_captured(raw: bytes) -> list[Captured]:
    """One for each text, from the file of tensors that `capture` answers. Raises ValueError for another file."""
    arrays, results = read_tensors(raw, most=len(raw)), answer_in(raw)["results"]
    found: list[dict[str, Numbers]] = [{} for _ in results]
    for name, array in arrays.items():
        place, cut, point = name.partition("/")
        found[int(place) if cut else 0][point if cut else name] = array
    return [
        Captured(
            tuple(one["tokens"]), tuple(one["token_ids"]), tuple(one["is_special"]), tuple(one["positions"]), states
        )
        for one, states in zip(results, found, strict=True)
    ]


def in_parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """As many as one request may have, again and again. Raises ValueError where there is none."""
    if not texts:
        raise ValueError("a mean needs at least one text on either side")
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        yield list(texts[first : first + TEXTS_AT_ONCE])


def difference(a: Sequence[Captured], b: Sequence[Captured], point: str) -> Vector:
    """From the mean of the texts of b to that of a."""
    import numpy

    means = [numpy.mean([one[point].mean(axis=0) for one in side], axis=0) for side in (a, b)]
    return Vector(tuple(map(float, means[0] - means[1])), point)
