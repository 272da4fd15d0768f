"""Rows that run one at a time, each in a lane of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

from neuronpedia_inference.engine.faults import failure_of
from neuronpedia_inference.engine.generation import Joining, Lane, NewRows
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowId, RowStep

FIXED_POSITIONS = 64
"""A piece of a prompt whose row runs by itself, where prompts may be run in pieces."""


class SoloLane:
    """Rows that run one at a time: where they must not be merged, or must not depend on who else is here."""

    def __init__(
        self,
        make: Callable[[], Lane],
        products: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        takes_turns: bool = False,
    ) -> None:
        """`make` gives the lane of one row; passes run inside `products`. takes_turns: one row in a step, the next in
        the next: whoever else there is waits for no more than one."""
        self._make = make
        self._products = products
        self._takes_turns = takes_turns
        self._lanes: dict[RowId, Lane] = {}
        self._parked: frozenset[RowId] = frozenset()

    @property
    def rows(self) -> list[RowId]:
        return list(self._lanes)

    @property
    def decoding(self) -> list[RowId]:
        """Who steps first comes first."""
        return [row for row in self._lanes if row not in self._parked]

    def park(self, rows: Collection[RowId]) -> None:
        self._parked |= self._lanes.keys() & set(rows)

    def resume(self, rows: Collection[RowId]) -> None:
        self._parked -= set(rows)

    def begin(self, rows: NewRows) -> SoloJoining:
        return SoloJoining(self, {row[0]: self._make().begin([row]) for row in rows}, self._products)

    def prefill(self, rows: NewRows) -> list[RowStep]:
        joining = self.begin(rows)
        while not joining.is_done:
            joining.advance(1)
        return joining.join()

    def decode(self) -> list[RowStep]:
        """A step that fails ends its own row."""
        running = self.decoding[:1] if self._takes_turns else self.decoding
        with self._products():
            steps = [step for row in running for step in _step_of(row, self._lanes[row])]
        self._lanes |= {row: self._lanes.pop(row) for row in running}
        return self._without_finished(steps)

    def drop(self, rows: Collection[RowId]) -> None:
        self._parked -= set(rows)
        self._lanes = {id_: lane for id_, lane in self._lanes.items() if id_ not in rows}

    def take_in(self, joining: dict[RowId, Joining]) -> list[RowStep]:
        """After an exception none has joined."""
        steps = [step for one in joining.values() for step in one.join()]
        self._lanes |= {id_: one.lane for id_, one in joining.items()}
        return self._without_finished(steps)

    def _without_finished(self, steps: list[RowStep]) -> list[RowStep]:
        self.drop({step.row for step in steps if step.ends})
        return steps


class SoloJoining:
    """As `Joining`; a piece has a fixed size, or is the whole prompt of one row."""

    def __init__(
        self, lane: SoloLane, rows: dict[RowId, Joining], products: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._lane = lane
        self._products = products
        self._rows = rows
        self.n_tokens = sum(one.n_tokens for one in rows.values())
        self.n_padding = 0
        self.weight = max(one.weight for one in rows.values())

    @property
    def is_done(self) -> bool:
        return all(one.is_done for one in self._rows.values())

    def advance(self, n_tokens: int) -> int:
        with self._products():
            return next(one.advance(FIXED_POSITIONS) for one in self._rows.values() if not one.is_done)

    def join(self) -> list[RowStep]:
        return self._lane.take_in(self._rows)


def _step_of(row: RowId, lane: Lane) -> list[RowStep]:
    steps: list[RowStep] = []
    failure = failure_of(lambda: steps.extend(lane.decode()))
    return steps if failure is None else [RowStep(row, NO_TOKEN, error=failure)]
