"""An engine without a model: rows count down, and captures sum their prompts."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Any

from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.recent import Recent


class CountingEngine:
    """Rows count down from their prompt's number; prompt -1 fails, and its failure is a bug and not a refusal."""

    def __init__(self) -> None:
        self.steps = 0
        self.passes: list[int] = []
        self.pieces: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.lane = CountingLane(self)
        self.reproducible_lane = CountingLane(self)
        self.recent: Recent[Any, Any] = Recent.nothing()

    def begin_capture(self, rows: Sequence[RowSpec], points: object, *, reproducible: bool = False) -> SummingPass:
        self.passes.append(len(rows))
        return SummingPass(self, [row.prompt_ids for row in rows])


class CountingPass:
    """Runs prompts of one length."""

    depth = weight = 1.0
    n_padding = 0

    def __init__(self, engine: CountingEngine, prompts: Sequence[Sequence[int]]) -> None:
        self.engine = engine
        self.prompts = prompts
        self.n_tokens = sum(map(len, prompts))
        self.n_done = 0
        self.pieces: list[int] = []

    @property
    def is_done(self) -> bool:
        return self.n_done == self.n_tokens

    def advance(self, n_tokens: int) -> int:
        if any(list(prompt) == [-1] for prompt in self.prompts):
            raise ZeroDivisionError("bug")
        n_run = min(n_tokens, self.n_tokens - self.n_done)
        self.n_done += n_run
        self.engine.pieces.append(n_run)
        return n_run


class SummingPass(CountingPass):
    def result(self) -> list[Any]:
        return [{"sum": sum(prompt)} for prompt in self.prompts]


class CountingJoining(CountingPass):
    def __init__(self, lane: CountingLane, rows: Sequence[tuple[RowId, RowSpec]]) -> None:
        super().__init__(lane.engine, [spec.prompt_ids for _, spec in rows])
        self.lane, self.rows = lane, rows

    def join(self) -> list[RowStep]:
        self.lane.left |= {id_: spec.prompt_ids[0] for id_, spec in self.rows}
        return self.lane.steps([id_ for id_, _ in self.rows])


class CountingLane:
    def __init__(self, engine: CountingEngine) -> None:
        self.engine = engine
        self.left: dict[RowId, int] = {}
        self.prefills: list[int] = []
        self.batches: list[int] = []
        self.is_broken = False
        self.parked: set[RowId] = set()

    @property
    def decoding(self) -> list[RowId]:
        return [row for row in self.left if row not in self.parked]

    def park(self, rows: Collection[RowId]) -> None:
        self.parked |= set(rows)

    def resume(self, rows: Collection[RowId]) -> None:
        self.parked -= set(rows)

    @property
    def rows(self) -> list[RowId]:
        return list(self.left)

    def begin(self, rows: Sequence[tuple[RowId, RowSpec]]) -> CountingJoining:
        self.prefills.append(len(rows))
        return CountingJoining(self, rows)

    def decode(self) -> list[RowStep]:
        self.batches.append(len(self.decoding))
        if self.is_broken:
            raise ZeroDivisionError("bug")
        return self.steps(self.decoding)

    def drop(self, rows: Collection[RowId]) -> None:
        self.left = {id_: n for id_, n in self.left.items() if id_ not in rows}
        self.parked -= set(rows)

    def steps(self, rows: Sequence[RowId]) -> list[RowStep]:
        self.engine.gate.wait(60)
        self.engine.steps += 1
        steps = []
        for id_ in rows:
            self.left[id_] -= 1
            error = InvalidRequest("too strong") if self.left[id_] == 664 else None
            finish = "length" if self.left[id_] == 0 else None
            steps.append(RowStep(id_, self.left[id_], finish_reason=finish, error=error))
        self.drop({step.row for step in steps if step.ends})
        return steps
