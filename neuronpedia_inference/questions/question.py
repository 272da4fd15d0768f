"""What the runtime wants to know of a question, and what a question wants to know of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from neuronpedia_inference.domain import Source, TokenEffects, Tokens
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.points import Point

Answer_co = TypeVar("Answer_co", covariant=True)


class Places(Protocol):
    """Where the model can be read."""

    def check(self, point: Point, *, write: bool = False) -> None:
        """Raises UnknownPoint with the reason."""
        ...

    def check_lens(self) -> None:
        """Raises InvalidRequest where the residual stream cannot be read out."""
        ...

    def width(self, point: Point) -> int:
        """Of one position's vector, heads concatenated."""
        ...


class Weights(Protocol):
    """The weights of sources."""

    def request(self, source: Source, /) -> Future[Any]:
        """The right to use them, as soon as they are there: a lease, whose block has the FeatureReader."""
        ...

    def feature(self, source: Source, index: int, /) -> Future[Any]:
        """Those of one feature, in the place of a lease, whose block has the FeatureWeights. Raises InvalidRequest for
        neurons."""
        ...

    def decoder_row(self, source: Source, index: int, /) -> Future[Any]:
        """A decoder row, in the place of a lease, whose block has a float32 tensor. Raises as `feature` does."""
        ...

    @property
    def readout(self) -> Callable[[Any], Any]:
        """The model's own logits [pos, vocab], float32, of what is behind its last block: [pos, d_model]."""
        ...

    def token_effects(self, source: Source, row: Any, k: int, /) -> TokenEffects:
        """What a decoder row of the source does to the next token by the direct path."""
        ...


class Question(Protocol[Answer_co]):
    """A value; `reduce` runs on the worker, everything else where the request came in."""

    @property
    def prompts(self) -> Sequence[Tokens]:
        """What the model runs; none where only weights are asked about."""
        ...

    @property
    def points(self) -> Collection[Point]:
        """What is read in it."""
        ...

    @property
    def n_bytes(self) -> int:
        """What the reduction and its result take at the most, beside what was captured."""
        ...

    def check(self, places: Places, vocab_size: int) -> None:
        """Raises InvalidRequest or UnknownPoint unless it can be answered. No tensors."""
        ...

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Generator[Future[Any] | None, Any, Answer_co]:
        """The answer, from one mapping of point to tensor per prompt; steps as in `scheduler.jobs.Steps`."""
        ...
