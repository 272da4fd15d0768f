"""What is read while a text is generated: from a request's `watch` to a plan, and from its numbers to the answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.domain import Numbers, Written
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.growing import GrowingList
from neuronpedia_inference.schemas.watch import SteerWatch, SteerWatched, WatchedFeature, WatchValues
from neuronpedia_inference.watches.plan import TopRead, Watch, WatchFeature, WatchPlan

if TYPE_CHECKING:
    from neuronpedia_inference.engine.points import Point
    from neuronpedia_inference.runtime import Runtime

Make = Callable[[Numbers], Any]
"""Of the numbers of one position: the value as it stands in an answer."""


def watch_plan(asked: Sequence[SteerWatch], rt: Runtime) -> WatchPlan:
    """Raises InvalidRequest, LimitExceeded, UnknownSource or UnknownPoint."""
    return WatchPlan.of([_checked(one, f"watch.{place}", rt) for place, one in enumerate(asked)])


def _checked(asked: SteerWatch, where: str, rt: Runtime) -> Watch:
    given = sorted(asked.model_fields_set - {"source"})
    if len(given) != 1 or getattr(asked, given[0]) is None:
        raise InvalidRequest(f"{where}: give exactly one of index, top_k (both with a source) and hook")
    if asked.hook is not None:
        if asked.source is not None:
            raise InvalidRequest(f"{where}: a hook has no source; give index or top_k to read one")
        return rt.watches.vector(asked.hook)
    source = asked.source or _only_source(where, rt)
    if asked.index is not None:
        return rt.watches.feature(source, asked.index)
    assert asked.top_k is not None
    return rt.watches.top(source, asked.top_k)


def _only_source(where: str, rt: Runtime) -> str:
    sources = rt.shelf.sources
    if len(sources) == 1:
        return sources[0].name
    names = ", ".join(source.name for source in sources[:12]) or "none"
    raise InvalidRequest(f"{where}.source: name one, there is not exactly one to choose. Available: {names}")


@dataclass
class _Column:
    """One watch of one row, on one side of the edits of its place."""

    place: slice
    make: Make
    newest: list[Any] = field(default_factory=list)
    all: GrowingList[Numbers] = field(init=False)

    def __post_init__(self) -> None:
        self.all = GrowingList(self.make)

    def add(self, numbers: Numbers) -> None:
        """[pos, n] of all watches"""
        mine = list(numbers[:, self.place])
        self.newest = [self.make(one) for one in mine]
        self.all.add(mine)


class Watched:
    """What has been read of one row: each token is told once its numbers are known."""

    def __init__(
        self,
        asked: Sequence[SteerWatch],
        plan: WatchPlan,
        edited: Collection[Point],
        prompt: Sequence[str],
        label: Callable[[str, int], str | None],
    ) -> None:
        """edited: where the row is edited. prompt: its tokens. label: of a source's feature, where it has one."""
        self._asked = asked
        self._waiting = deque(prompt)
        self._tokens = GrowingList[str](lambda token: token)
        self._newest: list[str] = []
        makes = [_maker(watch, label) for watch in plan.watches]
        places = plan.places(edited)
        self._before = [
            None if place.before is None else _Column(place.before, make)
            for place, make in zip(places, makes, strict=True)
        ]
        self._after = [_Column(place.behind, make) for place, make in zip(places, makes, strict=True)]

    def add(self, written: Written) -> None:
        self._waiting.extend(written.tokens)
        numbers = written.numbers
        self._newest = [] if numbers is None else [self._waiting.popleft() for _ in numbers]
        self._tokens.add(self._newest)
        for column in (*self._before, *self._after):
            if column is None:
                continue
            if numbers is None:
                column.newest = []
            else:
                column.add(numbers)

    def so_far(self) -> SteerWatched:
        return self._reply(self._tokens, lambda column: column.all)

    def newest(self) -> SteerWatched:
        """What the last `add` has brought."""
        return self._reply(self._newest, lambda column: column.newest)

    def _reply(self, tokens: Any, of: Callable[[_Column], Any]) -> SteerWatched:
        return SteerWatched.model_construct(
            tokens=tokens,
            values=[
                WatchValues.model_construct(
                    watch=_as_asked(asked), before=None if before is None else of(before), after=of(after)
                )
                for asked, before, after in zip(self._asked, self._before, self._after, strict=True)
            ],
        )


def _as_asked(asked: SteerWatch) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in SteerWatch.model_fields if name in asked.model_fields_set}


def _maker(watch: Watch, label: Callable[[str, int], str | None]) -> Make:
    if isinstance(watch, WatchFeature):
        return lambda numbers: float(numbers[0])
    if not isinstance(watch, TopRead):
        return lambda numbers: numbers.tolist()
    source, k = watch.source.name, watch.k

    def features(numbers: Numbers) -> list[WatchedFeature]:
        pairs = zip(numbers[:k].astype(int).tolist(), numbers[k:].tolist(), strict=True)
        return [WatchedFeature(index=i, value=value, label=label(source, i)) for i, value in pairs]

    return features
