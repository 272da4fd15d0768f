"""What is read while a text is generated: from a request's `watch` to a plan, and from its numbers to the answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.domain import Lens, Numbers, Written
from neuronpedia_inference.edits.plan import N_TOLD, Do, Edit, Feature, fires_in
from neuronpedia_inference.engine.protocol import Retry
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.edits import condition_of
from neuronpedia_inference.operations.growing import GrowingList
from neuronpedia_inference.operations.prompts import the_only
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.schemas.watch import (
    AskedWatch,
    NPLogprobTop,
    SteerRule,
    SteerWatch,
    SteerWatched,
    WatchedEdit,
    WatchedFeature,
    WatchedLayer,
    WatchValues,
)
from neuronpedia_inference.watches.plan import Place, TopRead, Watch, WatchEdits, WatchFeature, WatchLens, WatchPlan
from neuronpedia_inference.watches.rules import RulePlan

if TYPE_CHECKING:
    from neuronpedia_inference.points import Point
    from neuronpedia_inference.runtime import Runtime

_BESIDE: dict[str, set[str]] = {"index": {"source"}, "top_k": {"source"}, "hook": set(), "lens": {"layers", "top_n"}}
"""What a watch may be, and what goes with each."""
Make = Callable[[Numbers], Any]
"""Of the numbers of one position: the value as it stands in an answer."""


def watch_plan(
    asked: Sequence[AskedWatch], rules: Sequence[SteerRule], rt: Runtime, *, tells_edits: bool = False
) -> RulePlan | None:
    """What is asked for, and behind it what rules look at; None where there is neither. tells_edits: whether edits are
    watched for something else too.

    Raises InvalidRequest, LimitExceeded, UnknownSource or UnknownPoint.
    """
    if not asked and not rules and not tells_edits:
        return None
    watches = [_checked(one, f"watch.{place}", rt) for place, one in enumerate(asked)]
    watches += [WatchEdits()] * tells_edits
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


def _checked(asked: AskedWatch, where: str, rt: Runtime) -> Watch:
    if not isinstance(asked, SteerWatch):
        return WatchEdits()
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
    source = asked.source or the_only(f"{where}.source", [one.name for one in rt.shelf.all_sources])
    if asked.index is not None:
        return rt.watches.feature(source, asked.index)
    assert asked.top_k is not None
    return rt.watches.top(source, asked.top_k)


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
        asked: Sequence[AskedWatch],
        plan: WatchPlan,
        edited: Collection[Point],
        edits: Sequence[Edit],
        prompt: Sequence[str],
        rt: Runtime,
    ) -> None:
        """asked: the first of the plan's watches. edited: where the row's `edits` write. prompt: its tokens."""
        self._waiting = deque(prompt)
        self._is_read = plan.n_numbers(edited, len(edits)) > 0
        self._tokens = GrowingList[str](lambda token: token)
        self._newest: list[str] = []
        self._entries: list[_Entry | _EditsEntry] = [
            _Entry(one, place, _maker(watch, rt)) if isinstance(one, SteerWatch) else _EditsEntry(edits, rt)
            for one, watch, place in zip(asked, plan.watches, plan.places(edited, len(edits)), strict=False)
        ]

    def add(self, written: Written) -> None:
        self._waiting.extend(written.tokens)
        n_known = len(self._waiting) if not self._is_read else 0 if written.numbers is None else len(written.numbers)
        self._newest = [self._waiting.popleft() for _ in range(n_known)]
        self._tokens.add(self._newest)
        for entry in self._entries:
            for column in entry.columns:
                column.add(written.numbers)

    def so_far(self) -> SteerWatched:
        return self._reply(self._tokens, lambda column: column.all)

    def newest(self) -> SteerWatched:
        """What the last `add` has brought."""
        return self._reply(self._newest, lambda column: column.newest())

    def _reply(self, tokens: Any, of: Of) -> SteerWatched:
        return SteerWatched.model_construct(tokens=tokens, values=[entry.reply(of) for entry in self._entries])


Of = Callable[[_Column], Any]
"""What is told of a column."""


class _Entry:
    """What one watch has read of one row."""

    def __init__(self, asked: SteerWatch, place: Place, make: Make) -> None:
        self._asked = {name: getattr(asked, name) for name in SteerWatch.model_fields if name in asked.model_fields_set}
        self._before = None if place.before is None else _Column(place.before, make)
        self._after = _Column(place.behind, make)

    @property
    def columns(self) -> list[_Column]:
        return [column for column in (self._before, self._after) if column is not None]

    def reply(self, of: Of) -> WatchValues:
        before = None if self._before is None else of(self._before)
        return WatchValues.model_construct(watch=self._asked, before=before, after=of(self._after))


class _EditsEntry:
    """What the edits of one row have found and done; null at tokens at which they have not acted."""

    def __init__(self, edits: Sequence[Edit], rt: Runtime) -> None:
        self._edits = edits
        self._told = [_told(edit, rt) for edit in edits]
        self._columns = [
            {name: _Column((first, first + at), _acted if at else _share) for at, name in enumerate(_NUMBERS)}
            for first in range(0, N_TOLD * len(edits), N_TOLD)
        ]

    @property
    def columns(self) -> list[_Column]:
        return [column for of_edit in self._columns for column in of_edit.values()]

    def reply(self, of: Of) -> WatchValues:
        edits = [
            WatchedEdit.model_construct(
                edit=edit.field,
                id=edit.name or None,
                **{name: of(columns[name]) if name in told else None for name in _NUMBERS},
            )
            for edit, told, columns in zip(self._edits, self._told, self._columns, strict=True)
        ]
        return WatchValues.model_construct(watch="edits", before=None, after=None, edits=edits)


_NUMBERS = ("share", "before", "target", "after", "dose")


def _told(edit: Edit, rt: Runtime) -> set[str]:
    """Which of an edit's numbers mean something."""
    if edit.do is Do.ADD:
        return {"share", "dose"}
    target = edit.target
    is_read_again = not (isinstance(target, Feature) and rt.shelf.source(target.source).is_transcoder)
    return {name for name in _NUMBERS if is_read_again or name != "after"}


def _share(numbers: Numbers) -> float:
    return float(numbers[0])


def _acted(numbers: Numbers) -> float | None:
    """numbers: the share, and what is told."""
    share, number = numbers.tolist()
    return number if share > 0 else None


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


def _layers(watch: WatchLens, numbers: Numbers, rt: Runtime) -> Rows[WatchedLayer]:
    by_layer = numbers.reshape(len(watch.reads), -1)

    def layer(place: int) -> WatchedLayer:
        top = [NPLogprobTop(token=rt.token_string(i), logprob=value) for i, value in _pairs(by_layer[place])]
        return WatchedLayer(layer=watch.reads[place].layer, top=top)

    return Rows(len(watch.reads), layer)


def _pairs(numbers: Numbers) -> Iterator[tuple[int, float]]:
    """[2k]: k whole numbers, and what belongs to each."""
    k = len(numbers) // 2
    return zip(numbers[:k].astype(int).tolist(), numbers[k:].tolist(), strict=True)
