"""What is read while a text is generated: from a request's `watch` to a plan, and from its numbers to the answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.domain import Lens, Numbers, Written
from neuronpedia_inference.edits.plan import fires_in
from neuronpedia_inference.engine.protocol import Retry
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.edits import condition_of
from neuronpedia_inference.operations.growing import GrowingList
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.schemas.watch import (
    NPLogprobTop,
    SteerRule,
    SteerWatch,
    SteerWatched,
    WatchedFeature,
    WatchedLayer,
    WatchValues,
)
from neuronpedia_inference.watches.plan import TopRead, Watch, WatchFeature, WatchLens, WatchPlan
from neuronpedia_inference.watches.rules import RulePlan

if TYPE_CHECKING:
    from neuronpedia_inference.engine.points import Point
    from neuronpedia_inference.runtime import Runtime

_BESIDE: dict[str, set[str]] = {"index": {"source"}, "top_k": {"source"}, "hook": set(), "lens": {"layers", "top_n"}}
"""What a watch may be, and what goes with each."""
Make = Callable[[Numbers], Any]
"""Of the numbers of one position: the value as it stands in an answer."""


def watch_plan(asked: Sequence[SteerWatch], rules: Sequence[SteerRule], rt: Runtime) -> RulePlan | None:
    """What is asked for, and behind it what rules look at; None where there is neither.

    Raises InvalidRequest, LimitExceeded, UnknownSource or UnknownPoint.
    """
    if not asked and not rules:
        return None
    watches = [_checked(one, f"watch.{place}", rt) for place, one in enumerate(asked)]
    conditions = [condition_of(rule.when, f"rules.{place}.when", rt) for place, rule in enumerate(rules)]
    looked_at = list(dict.fromkeys(fires for condition in conditions for fires in fires_in(condition)))
    watch_of = {fires: len(watches) + place for place, fires in enumerate(looked_at)}
    features = [rt.watches.feature(fires.feature.source, fires.feature.index) for fires in looked_at]
    n_times = sum(rule.times for rule in rules if rule.do == "retry")
    if n_times >= rt.model.vocab_size:
        raise InvalidRequest(
            f"rules: the times of all retries, {n_times}, must be fewer than the model's {rt.model.vocab_size} tokens, "
            "of which each may rule one out. Give fewer."
        )
    retries = tuple(Retry(rule.back, rule.times) if rule.do == "retry" else None for rule in rules)
    return RulePlan(tuple(conditions), retries, watch_of, WatchPlan.of([*watches, *features]))


def _checked(asked: SteerWatch, where: str, rt: Runtime) -> Watch:
    given = [name for name in _BESIDE if name in asked.model_fields_set]
    if len(given) != 1 or getattr(asked, given[0]) is None:
        raise InvalidRequest(f"{where}: give exactly one of index, top_k (both of a source), hook and lens")
    [kind] = given
    for other in sorted(asked.model_fields_set - {kind} - _BESIDE[kind]):
        raise InvalidRequest(f"{where}: {other} does not go with {kind}")
    if asked.hook is not None:
        return rt.watches.vector(asked.hook)
    if asked.lens is not None:
        return rt.watches.lens(Lens(asked.lens), asked.layers, asked.top_n)
    source = asked.source or _only_source(where, rt)
    if asked.index is not None:
        return rt.watches.feature(source, asked.index)
    assert asked.top_k is not None
    return rt.watches.top(source, asked.top_k)


def _only_source(where: str, rt: Runtime) -> str:
    sources = rt.shelf.all_sources
    if len(sources) == 1:
        return sources[0].name
    names = ", ".join(source.name for source in sources[:12]) or "none"
    raise InvalidRequest(f"{where}.source: name one, there is not exactly one to choose. Available: {names}")


@dataclass
class _Column:
    """One watch of one row, on one side of the edits of its place."""

    place: Sequence[int]
    make: Make
    all: GrowingList[Numbers] = field(init=False)
    _n_newest: int = 0

    def __post_init__(self) -> None:
        self.all = GrowingList(self.make)

    def add(self, numbers: Numbers | None) -> None:
        """[pos, n] of all watches; None where nothing new has been read."""
        mine = [] if numbers is None else list(numbers[:, list(self.place)])
        self._n_newest = len(mine)
        self.all.add(mine)

    def newest(self) -> Rows[Any]:
        """What the last `add` has brought, made while it is written."""
        first = len(self.all) - self._n_newest
        return Rows(self._n_newest, lambda n: self.make(self.all[first + n]))


class Watched:
    """What has been read of one row: each token is told once its numbers are known."""

    def __init__(
        self,
        asked: Sequence[SteerWatch],
        plan: WatchPlan,
        edited: Collection[Point],
        prompt: Sequence[str],
        rt: Runtime,
    ) -> None:
        """asked: the first of the plan's watches. edited: where the row is edited. prompt: its tokens."""
        self._asked = asked
        self._waiting = deque(prompt)
        self._tokens = GrowingList[str](lambda token: token)
        self._newest: list[str] = []
        makes = [_maker(watch, rt) for watch in plan.watches[: len(asked)]]
        places = plan.places(edited)[: len(asked)]
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
            if column is not None:
                column.add(numbers)

    def so_far(self) -> SteerWatched:
        return self._reply(self._tokens, lambda column: column.all)

    def newest(self) -> SteerWatched:
        """What the last `add` has brought."""
        return self._reply(self._newest, lambda column: column.newest())

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


def _maker(watch: Watch, rt: Runtime) -> Make:
    if isinstance(watch, WatchFeature):
        return lambda numbers: float(numbers[0])
    if isinstance(watch, TopRead):
        return lambda numbers: _features(watch, numbers, rt)
    if isinstance(watch, WatchLens):
        return lambda numbers: _layers(watch, numbers, rt)
    return lambda numbers: numbers.tolist()


def _features(watch: TopRead, numbers: Numbers, rt: Runtime) -> list[WatchedFeature]:
    source = watch.source.name
    return [WatchedFeature(index=i, value=value, label=rt.shelf.label(source, i)) for i, value in _pairs(numbers)]


def _layers(watch: WatchLens, numbers: Numbers, rt: Runtime) -> list[WatchedLayer]:
    by_layer = numbers.reshape(len(watch.reads), -1)
    return [
        WatchedLayer(
            layer=read.layer,
            top=[NPLogprobTop(token=rt.token_string(i), logprob=value) for i, value in _pairs(of_layer)],
        )
        for read, of_layer in zip(watch.reads, by_layer, strict=True)
    ]


def _pairs(numbers: Numbers) -> Iterator[tuple[int, float]]:
    """[2k]: k whole numbers, and what belongs to each."""
    k = len(numbers) // 2
    return zip(numbers[:k].astype(int).tolist(), numbers[k:].tolist(), strict=True)
