"""When a text ends early or goes back: conditions on what is read at its tokens. Arithmetic on the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.edits.plan import Both, Condition, Either, Fires
from neuronpedia_inference.engine.protocol import Retry
from neuronpedia_inference.watches.plan import Place, WatchPlan

MAX_RULES = 16
"""Rules of one request."""
MAX_BACK, MAX_TIMES = 64, 16
"""Tokens that a rule takes back at once, and how often in one text."""


@dataclass(frozen=True, slots=True)
class RulePlan:
    """Conditions that end a text or take its newest tokens back, and which of a plan's watches is the feature that each
    of them looks at."""

    conditions: tuple[Condition, ...]
    retries: tuple[Retry | None, ...]
    """Of every condition; None: it ends the text."""
    watch_of: Mapping[Fires, int]
    watches: WatchPlan

    @property
    def n_refused(self) -> int:
        """Tokens of one text that may be taken back."""
        return sum(retry.back * retry.times for retry in self.retries if retry is not None)

    def of_row(self, places: Sequence[Place], ignored: frozenset[int]) -> tuple[TextRule, ...]:
        """places: of the plan's watches, among the row's numbers. ignored: ids of tokens that are not looked at."""
        columns = {fires: _before(places[number]) for fires, number in self.watch_of.items()}
        rules = zip(self.conditions, self.retries, strict=True)
        return tuple(TextRule(condition, retry, columns, ignored) for condition, retry in rules)


@dataclass(frozen=True, slots=True)
class TextRule:
    """One condition of one row. `engine.protocol.Rule`."""

    condition: Condition
    retry: Retry | None
    columns: Mapping[Fires, int]
    """Where a feature's number lies among those of a position: what it is before anything is edited there."""
    ignored: frozenset[int]
    """Ids of tokens at which nothing is looked at; at position 0 never."""

    def begin(self) -> Lookout:
        return Lookout(self)


class Lookout:
    """What one rule has seen of one text."""

    def __init__(self, rule: TextRule) -> None:
        self._rule = rule
        self._n_seen = 0
        self._fired: defaultdict[Fires, list[int]] = defaultdict(list)
        """Where each has fired."""

    def see(self, numbers: Numbers, ids: Sequence[int]) -> bool:
        """Take in the next positions, [pos, n]; whether the condition holds at the last of them, if it is looked at."""
        is_looked_at = False
        for row, token in zip(numbers, ids, strict=True):
            place, self._n_seen = self._n_seen, self._n_seen + 1
            is_looked_at = place > 0 and token not in self._rule.ignored
            for fires, column in self._rule.columns.items():
                if is_looked_at and _fires(fires, float(row[column])):
                    self._fired[fires].append(place)
        return is_looked_at and self._holds(self._rule.condition)

    def forget(self, n_positions: int) -> None:
        """The newest positions are not there any more."""
        self._n_seen -= n_positions
        for places in self._fired.values():
            while places and places[-1] >= self._n_seen:
                places.pop()

    def _holds(self, condition: Condition) -> bool:
        if isinstance(condition, Fires):
            places, here = self._fired[condition], self._n_seen - 1
            return bool(places) and (condition.n_tokens is None or here - places[-1] < condition.n_tokens)
        if isinstance(condition, Both | Either):
            parts = [self._holds(part) for part in condition.parts]
            return all(parts) if isinstance(condition, Both) else any(parts)
        return not self._holds(condition.part)


def _fires(fires: Fires, value: float) -> bool:
    return value < fires.threshold if fires.is_below else value > fires.threshold


def _before(place: Place) -> int:
    [column] = place.behind if place.before is None else place.before
    return column
