"""Rows that decode together: they join once their prompts have been run, draw a token a step, and leave at their end.

Every row's draws, failures and end are its own. What a lane knows of its rows changes last: a pass that raises leaves
it as it was. Leaving is only noted, and done when the next step or joining begins, so that it cannot fail.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.engine.cache import MaskForm, RowCache, RowMemory, SoloCache
from neuronpedia_inference.engine.decoder import Changes, Decoder, ends
from neuronpedia_inference.engine.faults import failure_of, let_go
from neuronpedia_inference.engine.prompts import PromptPass
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowId, RowSpec, RowStep
from neuronpedia_inference.engine.reads import Reads
from neuronpedia_inference.engine.sampling import Drawn, Sampler, draw
from neuronpedia_inference.engine.static import Record, StaticStep
from neuronpedia_inference.engine.steered import steering_edits
from neuronpedia_inference.errors import EngineFailed, InvalidRequest

log = logging.getLogger(__name__)

NewRows = Sequence[tuple[RowId, RowSpec]]


@dataclass
class _Row:
    id: RowId
    spec: RowSpec
    sampler: Sampler
    generated: list[int] = field(default_factory=list)
    finish: str | None = None
    """Why it draws no more; a watched row stays until its last token has been the input."""
    is_leaving: bool = False


@dataclass
class Lane:
    """One batch. A row's tokens are the same whoever else is in it: nothing is shared but the forward pass."""

    decoder: Decoder
    memory: RowMemory
    record: Record | None = None
    """Makes steps of fixed shape fast, where the rows allow them."""
    _rows: list[_Row] = field(default_factory=list, init=False)
    _is_settled: bool = field(default=True, init=False)
    """Whether cache and steering are those of the rows as they are now."""
    _changes: Changes = field(default=(), init=False)
    _reads: Reads = field(default_factory=lambda: Reads(()), init=False)
    _numbers: list[Numbers | None] = field(default_factory=list, init=False)
    """Of every row, what the last pass has read."""
    _static: StaticStep | None = field(default=None, init=False)

    @classmethod
    def merging(cls, decoder: Decoder, form: MaskForm, record: Record | None = None) -> Lane:
        """For many rows."""
        return cls(decoder, RowCache(decoder.model, form, stays=record is not None), record)

    @classmethod
    def alone(cls, decoder: Decoder) -> Lane:
        """For one row, with the cache that Hugging Face gives its model."""
        return cls(decoder, SoloCache(decoder.model.config, decoder.tree.rotation))

    @property
    def rows(self) -> list[RowId]:
        return [row.id for row in self._rows if not row.is_leaving]

    def begin(self, rows: NewRows) -> Joining:
        """Rows that will join once their prompts have been run. After an exception nothing has begun."""
        return Joining(self, rows)

    def prefill(self, rows: NewRows) -> list[RowStep]:
        """Rows join in one forward pass; the first token of each. After an exception none has joined."""
        joining = self.begin(rows)
        joining.advance(joining.n_tokens)
        return joining.join()

    def decode(self) -> list[RowStep]:
        """One more token for every row, and what has been read at the one before. Rows that draw no more leave.

        After an exception the rows are as they were: it may be tried again.
        """
        self._settle()
        rows = self._rows
        logits = self.logits(torch.tensor([row.generated[-1:] for row in rows]))
        return self._told(rows, logits, self._numbers)

    def logits(self, ids: Tensor) -> Tensor:
        """One position more for every row: [row, 1] ids -> [row, vocab], float32."""
        self._settle()
        if self.record is not None and not self._reads and StaticStep.fits([row.spec for row in self._rows]):
            return self._decode_whole(ids, self.record)
        if self.memory.is_outdated():
            return self._run_again()
        with self.memory.decode() as inputs:
            self._reads.begin([1] * len(self._rows))
            logits = self.decoder.forward(ids, inputs, self._changes, ends([1] * len(self._rows)))
            self._numbers = self._reads.take()
        return logits

    def drop(self, rows: Collection[RowId]) -> None:
        """Rows leave; ids of rows that are not here are ignored. Cannot fail."""
        for row in self._rows:
            row.is_leaving = row.is_leaving or row.id in rows
        self._is_settled = False
        if not self.rows:
            self._rows = []
            self.memory.clear()

    def take_in(self, rows: Sequence[_Row], prompts: PromptPass) -> list[RowStep]:
        """First tokens are drawn, and rows that go on join. After an exception none has joined."""
        self._settle()
        steps = self._told(rows, torch.stack(prompts.logits()), prompts.numbers())
        staying = [place for place, row in enumerate(rows) if not row.is_leaving]
        if staying:
            specs = [rows[place].spec for place in staying]
            lengths = [len(spec.prompt_ids) for spec in specs]
            longest = max(len(spec.prompt_ids) + spec.sampling.max_new_tokens for spec in specs)
            self.memory.join(prompts.cache, staying, lengths, longest)
            self._rows = [*self._rows, *(rows[place] for place in staying)]
            self._is_settled = False
        return steps

    def _run_again(self) -> Tensor:
        """As `logits` for one row's newest token, from the whole text, which takes the place of what was kept."""
        (row,) = self._rows
        text = replace(row.spec, prompt_ids=(*row.spec.prompt_ids, *row.generated))
        prompts = PromptPass(self.decoder, [text], self.memory.prompts(len(text.prompt_ids)))
        prompts.advance(prompts.width)
        self.memory.join(prompts.cache, [0], [prompts.width], prompts.width)
        self._numbers = [None if numbers is None else numbers[-1:] for numbers in prompts.numbers()]
        return torch.stack(prompts.logits())

    def _decode_whole(self, ids: Tensor, record: Record) -> Tensor:
        """[row, 1] ids -> [row, vocab]; the step is recorded when the cache has got other tensors."""
        assert isinstance(self.memory, RowCache)
        with self.memory.decode_whole():
            if self._static is None or not self._static.is_current:
                self._static = None  # first, so that its memory is there for the next one
                self._static = StaticStep(self.decoder, self.memory, record)
                self._static.steer([row.spec for row in self._rows])
            return self._static(ids)

    def _settle(self) -> None:
        """Rows that left make room, and steering becomes that of those who stay. After an exception: again."""
        if self._is_settled:
            return
        for place in reversed(range(len(self._rows))):
            if self._rows[place].is_leaving:
                self.memory.drop(place)
                self._rows[place] = self._rows[-1]
                self._rows.pop()
        specs = [row.spec for row in self._rows]
        self._reads = Reads(specs)
        self._numbers = [None] * len(specs)
        self._changes = steering_edits(specs, reads=self._reads)
        if self._static is not None and self._static.is_current:
            self._static.steer(specs)
        else:
            self._static = None
        self._is_settled = True

    def _told(self, rows: Sequence[_Row], logits: Tensor, numbers: Sequence[Numbers | None]) -> list[RowStep]:
        """Every row draws that goes on, and gets what was read of it. logits: [row, vocab]."""
        drawing = [place for place, row in enumerate(rows) if row.finish is None]
        drawn = dict(zip(drawing, self._draw(rows, drawing, logits) if drawing else (), strict=True))
        steps = [
            _with_numbers(drawn.get(place) or RowStep(row.id, NO_TOKEN, finish_reason=row.finish), row.spec, read)
            for place, (row, read) in enumerate(zip(rows, numbers, strict=True))
        ]
        for row, step in zip(rows, steps, strict=True):
            row.is_leaving = step.ends
        if any(step.ends for step in steps):
            self.drop(())
        return steps

    def _draw(self, rows: Sequence[_Row], places: Sequence[int], logits: Tensor) -> list[RowStep]:
        """One pass for the rows at these places; should it raise, each draws for itself. logits: [row, vocab]."""
        drawn: list[Drawn] = []
        samplers = [rows[place].sampler for place in places]
        failure = failure_of(lambda: drawn.extend(draw(_of(logits, places), samplers)))
        if failure is None:
            return [self._step(rows[place], one) for place, one in zip(places, drawn, strict=True)]
        let_go(failure)
        log.warning("a draw failed, and its rows draw one by one: %s", failure)
        return [self._step_alone(rows[place], logits[place : place + 1]) for place in places]

    def _step_alone(self, row: _Row, logits: Tensor) -> RowStep:
        """A draw that fails ends its own row. logits: [1, vocab]."""
        steps: list[RowStep] = []
        failure = failure_of(lambda: steps.append(self._step(row, draw(logits, [row.sampler])[0])))
        return steps[0] if failure is None else RowStep(row.id, NO_TOKEN, error=failure)

    def _step(self, row: _Row, drawn: Drawn) -> RowStep:
        if not drawn.is_finite:
            return RowStep(row.id, NO_TOKEN, error=_not_finite(row.spec))
        if not drawn.is_possible:
            return RowStep(row.id, NO_TOKEN, error=_no_distribution(row.spec))
        row.sampler.commit(drawn.token_id)
        row.generated.append(drawn.token_id)
        finish = None
        if drawn.token_id in self.decoder.stop_ids:
            finish = "stop"
        elif len(row.generated) >= row.spec.sampling.max_new_tokens:
            finish = "length"
        row.finish = finish
        is_awaited = finish is not None and bool(row.spec.watches)
        return RowStep(row.id, drawn.token_id, drawn.logprob, drawn.top, finish, is_awaited=is_awaited)


class Joining:
    """New rows of a lane while their prompts are run, all at once or in pieces."""

    def __init__(self, lane: Lane, rows: NewRows) -> None:
        specs = [spec for _, spec in rows]
        self.lane = lane
        self._rows = [_Row(id_, spec, Sampler(spec.sampling, spec.prompt_ids)) for id_, spec in rows]
        width = max(len(spec.prompt_ids) for spec in specs)
        self._prompts = PromptPass(lane.decoder, specs, lane.memory.prompts(width))
        self.n_tokens = width * len(rows)
        """Of all prompts, padding included."""

    @property
    def is_done(self) -> bool:
        return self._prompts.is_done

    def advance(self, n_tokens: int) -> int:
        """Run about so many tokens more, at least one of each prompt; how many it were. After an exception: no more."""
        n_positions = max(1, n_tokens // len(self._rows)) if self.lane.memory.in_pieces else self._prompts.width
        return len(self._rows) * self._prompts.advance(n_positions)

    def join(self) -> list[RowStep]:
        """The rows join the lane with the first token of each. After an exception none has."""
        return self.lane.take_in(self._rows, self._prompts)


class SoloLane:
    """Rows that run one at a time, each with the cache that Hugging Face gives its model."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lanes: dict[RowId, Lane] = {}

    @property
    def rows(self) -> list[RowId]:
        return list(self._lanes)

    def begin(self, rows: NewRows) -> SoloJoining:
        return SoloJoining(self, {row[0]: Lane.alone(self._decoder).begin([row]) for row in rows})

    def prefill(self, rows: NewRows) -> list[RowStep]:
        joining = self.begin(rows)
        while not joining.is_done:
            joining.advance(1)
        return joining.join()

    def decode(self) -> list[RowStep]:
        """A step that fails ends its own row."""
        return self._without_finished([step for id_, lane in self._lanes.items() for step in _step_of(id_, lane)])

    def drop(self, rows: Collection[RowId]) -> None:
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
    """As `Joining`; a piece is the whole prompt of one row."""

    def __init__(self, lane: SoloLane, rows: dict[RowId, Joining]) -> None:
        self._lane = lane
        self._rows = rows
        self.n_tokens = sum(one.n_tokens for one in rows.values())

    @property
    def is_done(self) -> bool:
        return all(one.is_done for one in self._rows.values())

    def advance(self, n_tokens: int) -> int:
        return next(one.advance(one.n_tokens) for one in self._rows.values() if not one.is_done)

    def join(self) -> list[RowStep]:
        return self._lane.take_in(self._rows)


def _step_of(row: RowId, lane: Lane) -> list[RowStep]:
    steps: list[RowStep] = []
    failure = failure_of(lambda: steps.extend(lane.decode()))
    return steps if failure is None else [RowStep(row, NO_TOKEN, error=failure)]


def _of(logits: Tensor, places: Sequence[int]) -> Tensor:
    """These rows; no copy if they are all."""
    return logits if len(places) == len(logits) else logits[list(places)]


def _with_numbers(step: RowStep, spec: RowSpec, numbers: Numbers | None) -> RowStep:
    if numbers is None or step.error is not None:
        return step
    if not np.isfinite(numbers).all():
        return RowStep(step.row, NO_TOKEN, error=_not_finite(spec))
    return replace(step, numbers=numbers)


def _not_finite(spec: RowSpec) -> Exception:
    if spec.steering:
        return InvalidRequest(
            "The steered model's output is not finite: the strength is too large. Lower strength or multiplier."
        )
    return EngineFailed("The model's output is not finite although nothing steers it: its precision overflows here.")


def _no_distribution(spec: RowSpec) -> Exception:
    sampling = spec.sampling
    return EngineFailed(
        f"No token can be drawn with temperature {sampling.temperature:g} and freq_penalty {sampling.freq_penalty:g}: "
        "their numbers leave the range of float32."
    )
