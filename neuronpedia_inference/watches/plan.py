"""What a request wants watched, as plain numbers, and where each answer lies among the numbers of a position."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from neuronpedia_inference.domain import Lens, Source
from neuronpedia_inference.edits.plan import N_TOLD
from neuronpedia_inference.points import RESID_POST, Point

MAX_WATCHES = 64
"""Watches of one request: each costs a little at every step of decoding."""


@dataclass(frozen=True, slots=True)
class WatchFeature:
    """The activation of a feature."""

    source: Source
    index: int


@dataclass(frozen=True, slots=True)
class FeaturesRead:
    """Features of one source, read together: a number each."""

    source: Source
    indices: tuple[int, ...]

    @property
    def point(self) -> Point:
        return Point.parse(self.source.hook)

    @property
    def n_numbers(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class TopRead:
    """The k strongest features of a source, strongest first: k indices and their k activations."""

    source: Source
    k: int

    @property
    def point(self) -> Point:
        return Point.parse(self.source.hook)

    @property
    def n_numbers(self) -> int:
        return 2 * self.k


@dataclass(frozen=True, slots=True)
class VectorRead:
    """What passes at a point, whole."""

    point: Point
    width: int

    @property
    def n_numbers(self) -> int:
        return self.width


@dataclass(frozen=True, slots=True)
class LensRead:
    """The n tokens that a lens finds most likely behind a block: n ids, n log-probabilities."""

    layer: int
    n: int
    lens: Lens = Lens.LOGIT
    words_only: bool = False
    """Only tokens that are words or parts of words; their log-probabilities are those among all tokens."""
    keeps_first: bool = False
    """The likeliest of all tokens comes first, be it a word or not."""

    @property
    def point(self) -> Point:
        return Point(self.layer, RESID_POST)

    @property
    def n_numbers(self) -> int:
        return 2 * self.n


@dataclass(frozen=True, slots=True)
class WatchLens:
    """The same behind several blocks."""

    reads: tuple[LensRead, ...]


@dataclass(frozen=True, slots=True)
class WatchEdits:
    """What the edits of a text find and do: N_TOLD numbers of each, in front of all others."""


Read = FeaturesRead | TopRead | VectorRead | LensRead
Watch = WatchFeature | TopRead | VectorRead | WatchLens | WatchEdits


@dataclass(frozen=True, slots=True)
class Place:
    """Where the numbers of one watch lie, among those of a position."""

    behind: tuple[int, ...]
    """What the rest of the model reads."""
    before: tuple[int, ...] | None
    """What came there; None where nothing edits it."""


@dataclass(frozen=True, slots=True)
class WatchPlan:
    """All watches of a request: equal ones are read once, and features of one source together."""

    watches: tuple[Watch, ...]
    reads: tuple[Read, ...]
    read_from: int = 0
    """Nothing is read before this position."""
    shows_before: bool = True
    """Whether points that are edited are read before the edits too."""

    @classmethod
    def of(cls, watches: Sequence[Watch], *, read_from: int = 0, shows_before: bool = True) -> WatchPlan:
        features: dict[Source, dict[int, None]] = {}
        for one in watches:
            if isinstance(one, WatchFeature):
                features.setdefault(one.source, {})[one.index] = None
        together = [FeaturesRead(source, tuple(indices)) for source, indices in features.items()]
        others = dict.fromkeys(chain.from_iterable(_reads(one) for one in watches))
        return cls(tuple(watches), (*together, *others), read_from, shows_before)

    def is_read_before(self, read: Read, edited: Collection[Point]) -> bool:
        """Whether it is read twice in a text that is edited at these points: before the edits, and behind them."""
        return self.shows_before and read.point in edited

    def n_numbers(self, edited: Collection[Point], n_edits: int = 0) -> int:
        """Of one position of a text with so many edits, at these points."""
        return self._n_told(n_edits) + sum(self._n_numbers(read, edited) for read in self.reads)

    def places(self, edited: Collection[Point], n_edits: int = 0) -> list[Place]:
        """Of every watch, in the row of one position of such a text."""
        starts = accumulate((self._n_numbers(read, edited) for read in self.reads), initial=self._n_told(n_edits))
        start_of: dict[Read, int] = dict(zip(self.reads, starts, strict=False))
        told = Place(tuple(range(self._n_told(n_edits))), None)
        return [told if isinstance(one, WatchEdits) else self._place(one, start_of, edited) for one in self.watches]

    @property
    def tells_edits(self) -> bool:
        return any(isinstance(one, WatchEdits) for one in self.watches)

    def _n_told(self, n_edits: int) -> int:
        return N_TOLD * n_edits if self.tells_edits else 0

    @property
    def whole(self) -> list[Source]:
        """Sources all of whose features are computed, each once."""
        needing = [
            read.source
            for read in self.reads
            if isinstance(read, TopRead) or (isinstance(read, FeaturesRead) and not read.source.is_read_by_column)
        ]
        return list(dict.fromkeys(needing))

    @property
    def lenses(self) -> list[LensRead]:
        """What logits are made for."""
        return [read for read in self.reads if isinstance(read, LensRead)]

    @property
    def held(self) -> list[Source]:
        """Those among them whose weights are needed until the text has ended."""
        return [source for source in self.whole if not source.is_neurons]

    def _place(self, one: Watch, start_of: dict[Read, int], edited: Collection[Point]) -> Place:
        if isinstance(one, WatchFeature):
            read = next(r for r in self.reads if isinstance(r, FeaturesRead) and r.source == one.source)
            first = start_of[read] + read.indices.index(one.index)
            is_twice = self.is_read_before(read, edited)
            return Place((first + read.n_numbers,), (first,)) if is_twice else Place((first,), None)
        before: tuple[int, ...] = ()
        behind: tuple[int, ...] = ()
        for read in _reads(one):
            columns = range(start_of[read], start_of[read] + read.n_numbers)
            before += tuple(columns)
            shift = read.n_numbers if self.is_read_before(read, edited) else 0
            behind += tuple(column + shift for column in columns)
        return Place(behind, before if before != behind else None)

    def _n_numbers(self, read: Read, edited: Collection[Point]) -> int:
        return read.n_numbers * (2 if self.is_read_before(read, edited) else 1)


def _reads(one: Watch) -> tuple[Read, ...]:
    """Of what is not read together with others."""
    if isinstance(one, WatchFeature | WatchEdits):
        return ()
    return one.reads if isinstance(one, WatchLens) else (one,)
