"""Rows that decode together: they join once their prompts have been run, draw a token a step, and leave at their end.

Every row's draws, failures and end are its own. What a lane knows of its rows changes last: a pass that raises leaves
it as it was. Leaving, parking and going back are only noted, and done when the next step or joining begins, so that
they cannot fail. A parked row keeps its slot and draws nothing. A row that has gone back runs the newest token that it
kept once more, for what comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.costs import NO_GRID, RECORDED_GRID, Grid
from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.engine.cache import MaskForm, RowCache, RowMemory, SoloCache
from neuronpedia_inference.engine.decoder import Changes, Decoder, ends
from neuronpedia_inference.engine.faults import failure_of
from neuronpedia_inference.engine.prefixes import Prefixes
from neuronpedia_inference.engine.prompts import Prompt, PromptPass, passes_of
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowId, RowSpec, RowStep, StopReader
from neuronpedia_inference.engine.reads import Reads
from neuronpedia_inference.engine.ruled import Ruled
from neuronpedia_inference.engine.sampling import Drawn, Sampler, draw
from neuronpedia_inference.engine.slots import Slots
from neuronpedia_inference.engine.static import Record, Recordings, StaticStep
from neuronpedia_inference.engine.steered import steering_edits
from neuronpedia_inference.engine.where import Passing, Span, begun
from neuronpedia_inference.errors import EngineFailed, InvalidRequest, let_go
from neuronpedia_inference.recent import Recent

log = logging.getLogger(__name__)

STEPS_AHEAD = 32
"""In so many steps the cache grows, before it has to."""

NewRows = Sequence[tuple[RowId, RowSpec]]


@dataclass
class _Row:
    id: RowId
    spec: RowSpec
    sampler: Sampler
    ruled: Ruled
    generated: list[int] = field(default_factory=list)
    finish: str | None = None
    """Why it draws no more; a watched row stays until its last token has been the input."""
    rule: int | None = None
    """The one that has ended it at its newest token."""
    reader: StopReader | None = None
    """Of its text, where texts may end it."""
    length: int = 0
    """Positions whose keys and values are kept."""
    read: list[Numbers] = field(default_factory=list)
    """What was read of them: of the prompt, then position by position."""
    is_cut: bool = False
    """Behind them may be what was taken back."""
    is_returning: bool = False
    """The next pass is of a position that has been read."""
    is_parked: bool = False
    is_leaving: bool = False
    has_failed: bool = False

    @property
    def newest(self) -> int:
        """The token that is the next input."""
        return (self.generated or self.spec.prompt_ids)[-1]

    @property
    def draws(self) -> bool:
        """Whether the pass that has just been looked at gives it a token."""
        return self.finish is None and not self.is_returning

    def read_anew(self) -> None:
        """What has been generated, as text, where that may end it."""
        if self.spec.stops is None:
            return
        self.reader = self.spec.stops.begin()
        for token in self.generated:
            self.reader.ends_at(token)

    def look(self, numbers: Numbers | None) -> None:
        """What a pass has read: the rules see it, and the first that wants to acts on the newest generated token."""
        if self.is_returning or numbers is None:
            self.is_returning = False
            return
        self.read.append(numbers)
        rule = self.ruled.see(numbers, self.generated[-1:] or self.spec.prompt_ids)
        if rule is None or not self.generated:
            return
        if self.spec.rules[rule].retry is None:
            self.finish, self.rule = "stop_rule", rule
        else:
            self._go_back(rule)

    def _go_back(self, rule: int) -> None:
        n_tokens, goes_on = self.ruled.refuse(rule, len(self.generated))
        refused = self.generated[-n_tokens:]
        del self.generated[-n_tokens:]
        del self.read[-n_tokens:]
        self.sampler.take_back(refused)
        self.read_anew()
        self.length -= n_tokens + 1
        self.finish = None if goes_on else "retry_exhausted"
        self.is_cut, self.is_returning = True, goes_on


@dataclass
class Lane:
    """One batch. A row's tokens are the same whoever else is in it: nothing is shared but the forward pass."""

    decoder: Decoder
    memory: RowMemory
    recorded: Recordings | None = None
    """Steps of fixed shape, taken where the rows allow them."""
    prefixes: Prefixes = field(default_factory=lambda: Prefixes(Recent.nothing()))
    _slots: Slots[_Row] = field(default_factory=Slots, init=False)
    _is_settled: bool = field(default=True, init=False)
    """Whether slots and steering are those of the rows as they are now."""
    _decoding: Sequence[_Row] = field(default=(), init=False)
    _specs: Sequence[RowSpec] = field(default=(), init=False)
    """Of those who decode, in the order of their slots; another list when they are others."""
    _fits: bool = field(default=False, init=False)
    """Whether a step of fixed shape can do what these rows want."""
    _changes: Changes = field(default=(), init=False)
    _reads: Reads = field(default_factory=lambda: Reads(()), init=False)
    _numbers: list[Numbers | None] = field(default_factory=list, init=False)
    """Of every row, what the last pass has read."""
    _grid: Grid = field(default=NO_GRID, init=False)
    """What there is room for."""
    _passing: Passing = field(default_factory=Passing, init=False)

    @classmethod
    def merging(
        cls, decoder: Decoder, form: MaskForm, record: Record | None = None, recent: Recent | None = None
    ) -> Lane:
        """For many rows. `recent` gets what rows leave behind, for those that begin alike."""
        cache = RowCache(decoder.model, form, NO_GRID if record is None else RECORDED_GRID)
        recorded = None if record is None else Recordings(decoder, cache, record)
        return cls(decoder, cache, recorded, Prefixes(recent or Recent.nothing()))

    @classmethod
    def alone(cls, decoder: Decoder) -> Lane:
        """For one row, with the cache that Hugging Face gives its model."""
        return cls(decoder, SoloCache(decoder.model.config, decoder.tree.rotation))

    @property
    def rows(self) -> list[RowId]:
        """Those who decode, in their order, then those who are parked."""
        return [*self.decoding, *(row.id for row in self._slots.parked if not row.is_leaving)]

    @property
    def decoding(self) -> list[RowId]:
        return [row.id for row in self._slots.decoding if not row.is_leaving]

    def begin(self, rows: NewRows) -> Joining:
        """Rows that will join once their prompts have been run. After an exception nothing has begun."""
        self._settle()
        self._make_room([spec for _, spec in rows])
        return Joining(self, rows)

    def prefill(self, rows: NewRows) -> list[RowStep]:
        """Rows join in one forward pass; the first token of each. After an exception none has joined."""
        joining = self.begin(rows)
        while not joining.is_done:
            joining.advance(joining.n_tokens)
        return joining.join()

    def decode(self) -> list[RowStep]:
        """One more token for every row that decodes, and what has been read at the one before.

        Of rows with rules, what they are sure to keep: none, one or several. Rows that draw no more leave. After an
        exception all are as they were: try it again.
        """
        self._settle()
        if not self._decoding:
            return []
        logits = self.logits(torch.tensor([[row.newest] for row in self._decoding]))
        return self._told(self._decoding, logits, self._numbers)

    def logits(self, ids: Tensor) -> Tensor:
        """One position more for every row that decodes: [row, 1] ids -> [row, vocab], float32."""
        self._settle()
        lengths = [row.length for row in self._decoding]
        if max(lengths) >= self._grid.columns:
            self._make_room([])
        elif self.recorded is None:  # recordings belong to the tensors that there are
            self._make_room_ahead(self._grid.columns - max(lengths))
        found = self._logits(ids, lengths)
        for row in self._decoding:
            row.length += 1
        return found

    def park(self, rows: Collection[RowId]) -> None:
        """They draw nothing until they are resumed. Cannot fail."""
        self._set_parked(rows, True)

    def resume(self, rows: Collection[RowId]) -> None:
        """They decode again. Cannot fail."""
        self._set_parked(rows, False)

    def drop(self, rows: Collection[RowId]) -> None:
        """Rows leave; ids of rows that are not here are ignored. Cannot fail."""
        for row in self._slots:
            row.is_leaving = row.is_leaving or row.id in rows
        self._is_settled = False
        if not self.rows:
            self._keep_what_leaves()
            self._slots.clear()
            self.memory.clear()

    def take_in(self, passes: Sequence[tuple[Sequence[_Row], PromptPass]]) -> list[RowStep]:
        """First tokens are drawn, and rows that go on join. After an exception none has joined."""
        self._settle()
        rows = [row for of_pass, _ in passes for row in of_pass]
        logits = torch.stack([logits for _, prompts in passes for logits in prompts.logits()])
        steps = self._told(rows, logits, [numbers for _, prompts in passes for numbers in prompts.numbers()])
        staying = [row for row in rows if not row.is_leaving]
        if staying:
            self._settle()
            self._make_room([row.spec for row in staying])
            slot = len(self._decoding)
            for of_pass, prompts in passes:
                there = [(row, place) for row, place in zip(of_pass, prompts.places, strict=True) if not row.is_leaving]
                lengths = [len(row.spec.prompt_ids) for row, _ in there]
                self.memory.put(prompts.cache, [place for _, place in there], lengths, slot)
                slot += len(there)
            for slot, row in enumerate(staying, len(self._decoding)):
                row.length = len(row.spec.prompt_ids)
                self._slots.put(row, slot)
            self._is_settled = False
        return steps

    def _logits(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.recorded is not None and self._fits:
            return self.recorded.logits(ids, lengths, self._specs)
        if self.memory.is_outdated(lengths[0]):
            return self._run_again()
        self._passing.span = Span(lengths, ids)
        with self.memory.decode(lengths) as inputs:
            self._reads.begin([1] * len(lengths))
            logits = self.decoder.forward(ids, inputs, self._changes, ends([1] * len(lengths)))
            self._numbers = self._reads.take()
        return logits

    def _run_again(self) -> Tensor:
        """As `logits` for one row's newest token, from the whole text, which takes the place of what was kept."""
        (row,) = self._decoding
        text = replace(row.spec, prompt_ids=(*row.spec.prompt_ids, *row.generated), n_generated=len(row.generated))
        prompts = PromptPass(self.decoder, [Prompt([text])], self.memory.prompts(len(text.prompt_ids)))
        prompts.advance(prompts.width)
        self.memory.put(prompts.cache, [0], [prompts.width], 0)
        self._numbers = [None if numbers is None else numbers[-1:] for numbers in prompts.numbers()]
        return torch.stack(prompts.logits())

    def _set_parked(self, rows: Collection[RowId], is_parked: bool) -> None:
        for row in self._slots:
            row.is_parked = is_parked if row.id in rows else row.is_parked
        self._is_settled = False

    def _settle(self) -> None:
        """Rows that left or were parked make room, and steering becomes that of those who decode.

        After an exception: again.
        """
        if self._is_settled:
            return
        for slot, row in self._slots.placed:
            if row.is_cut:
                self.memory.cut(slot, row.length)
                row.is_cut = False
        self._keep_what_leaves()
        self._slots.free(lambda row: row.is_leaving)
        self.memory.trim(self._make_room([]))
        self._decoding = self._slots.decoding
        self._specs = [row.spec for row in self._decoding]
        self._reads = Reads(self._specs)
        self._fits = not self._reads and StaticStep.fits(self._specs)
        self._numbers = [None] * len(self._specs)
        self._changes = steering_edits(self._specs, self._passing, self._reads)
        self._is_settled = True

    def _keep_what_leaves(self) -> None:
        """For rows that begin alike. What cannot be kept is not: nobody waits for it."""
        for slot, row in self._slots.placed:
            if row.is_leaving and not row.has_failed:
                failure = failure_of(partial(self._keep, slot, row))
                if failure is not None:
                    let_go(failure)

    def _keep(self, slot: int, row: _Row) -> None:
        layers = self.memory.layers_of(slot, row.length)
        if layers is not None:
            numbers = np.concatenate(row.read) if row.read else None
            self.prefixes.keep(row.spec, row.generated, row.length, layers, numbers)

    def _make_room(self, new: Sequence[RowSpec]) -> Grid:
        """For rows beside those that are here, right behind those that decode; the grid that is needed for a step."""
        n_decoding, parked = len(self._slots.decoding) + len(new), self._slots.parked
        behind = n_decoding if self.recorded is None else self.recorded.n_slots(n_decoding)
        n_slots = behind + len(parked) + bool(parked)
        lengths = [*(row.length for row in self._slots), *(len(spec.prompt_ids) for spec in new)]
        grid = Grid.of(n_slots, 1 + max(lengths, default=0))
        self.memory.grow(grid)
        self._slots.arrange(behind, grid.slots, self.memory.move)
        self._grid = grid
        return grid

    def _make_room_ahead(self, n_steps: int) -> None:
        """Before the columns end, in so many steps, a part of the next ones. What fails is made when it is needed."""
        longest = max(len(row.spec.prompt_ids) + row.spec.sampling.max_new_tokens for row in self._slots)
        if n_steps <= STEPS_AHEAD and longest > self._grid.columns:
            columns = Grid.of(1, self._grid.columns + 1).columns
            failure = failure_of(partial(self.memory.grow_ahead, Grid(self._grid.slots, columns), n_steps))
            if failure is not None:
                let_go(failure)

    def _told(self, rows: Sequence[_Row], logits: Tensor, numbers: Sequence[Numbers | None]) -> list[RowStep]:
        """Every row draws that goes on, and gets what was read of it. logits: [row, vocab].

        What fails here ends its own row: the others have drawn, and their step must not be made again.
        """
        fresh = [None if row.is_returning else read for row, read in zip(rows, numbers, strict=True)]
        failures = [failure_of(partial(row.look, read)) for row, read in zip(rows, fresh, strict=True)]
        drawing = [n for n, row in enumerate(rows) if row.draws and failures[n] is None]
        drawn = dict(zip(drawing, self._draw(rows, drawing, logits) if drawing else (), strict=True))
        steps: list[RowStep] = []
        for n, row in enumerate(rows):
            step = drawn.get(n) or RowStep(row.id, NO_TOKEN, finish_reason=row.finish, rule=row.rule, error=failures[n])
            told = row.ruled.told(self._with_numbers(step, row.spec, fresh[n]))
            row.is_leaving = any(one.ends for one in told)
            row.has_failed = any(one.error is not None for one in told)
            steps += told
        if any(row.is_leaving or row.is_cut for row in rows):
            self.drop(())
        return steps

    def _with_numbers(self, step: RowStep, spec: RowSpec, numbers: Numbers | None) -> RowStep:
        if numbers is None or step.error is not None:
            return step
        if not np.isfinite(numbers).all():
            return RowStep(step.row, NO_TOKEN, error=_not_finite(spec, self.decoder.model.dtype))
        return replace(step, numbers=numbers)

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
            return RowStep(row.id, NO_TOKEN, error=_not_finite(row.spec, self.decoder.model.dtype))
        if not drawn.is_possible:
            return RowStep(row.id, NO_TOKEN, error=_no_distribution(row.spec))
        row.sampler.commit(drawn.token_id)
        row.generated.append(drawn.token_id)
        finish = None
        if drawn.token_id in self.decoder.stop_ids:
            finish = "stop"
        elif row.reader is not None and row.reader.ends_at(drawn.token_id):
            finish = "stop_string"
        elif len(row.generated) >= row.spec.sampling.max_new_tokens:
            finish = "length"
        row.finish = finish
        is_awaited = finish is not None and row.spec.is_read
        return RowStep(row.id, drawn.token_id, drawn.logprob, drawn.top, finish, is_awaited=is_awaited)


class Joining:
    """New rows of a lane while their prompts are run, all at once or in pieces."""

    def __init__(self, lane: Lane, rows: NewRows) -> None:
        self.lane = lane
        self._passes: list[tuple[Sequence[_Row], PromptPass]] = []
        begun_rows = [_begun(id_, asked) for id_, asked in rows]
        specs = [row.spec for row in begun_rows]
        for prompts in passes_of(specs, lane.prefixes if lane.memory.in_pieces else None):
            of_pass = [begun_rows[place] for _, places in prompts for place in places]
            cache = lane.memory.prompts(max(len(row.spec.prompt_ids) for row in of_pass))
            self._passes.append((of_pass, PromptPass(lane.decoder, [prompt for prompt, _ in prompts], cache)))
        self.n_tokens = sum(prompts.n_tokens for _, prompts in self._passes)
        """Of all prompts, padding included and without what is known of them."""
        self.n_padding = sum(prompts.n_padding for _, prompts in self._passes)
        self.weight = max(spec.weight for _, spec in rows)
        """What a token costs with all that is read there, in tokens of a bare pass."""

    @property
    def is_done(self) -> bool:
        return all(prompts.is_done for _, prompts in self._passes)

    def advance(self, n_tokens: int) -> int:
        """Run about so many tokens more, at least one of each prompt; how many it were. After an exception: no more.

        A rest of less than half a piece is run with the last: a pass costs a step, however little it has to do.
        """
        prompts = next(prompts for _, prompts in self._passes if not prompts.is_done)
        n_positions = max(1, n_tokens // prompts.n_prompts) if self.lane.memory.in_pieces else prompts.n_left
        n_run = prompts.advance(prompts.n_left if 2 * prompts.n_left < 3 * n_positions else n_positions)
        return prompts.n_prompts * n_run

    def join(self) -> list[RowStep]:
        """The rows join the lane with the first token of each. After an exception none has."""
        return self.lane.take_in(self._passes)


def _begun(id_: RowId, asked: RowSpec) -> _Row:
    spec = begun(asked)
    finish = None if spec.sampling.max_new_tokens else "length"
    row = _Row(id_, spec, Sampler(spec.sampling, spec.prompt_ids), Ruled(spec.rules), finish=finish)
    row.read_anew()
    return row


def _of(logits: Tensor, places: Sequence[int]) -> Tensor:
    """These rows; no copy if they are all."""
    return logits if len(places) == len(logits) else logits[list(places)]


def _not_finite(spec: RowSpec, dtype: torch.dtype) -> Exception:
    name = str(dtype).removeprefix("torch.")
    if not spec.edits:
        return EngineFailed(
            f"The model's output is not finite although nothing steers it: {name} overflows on this text. "
            "Another MODEL_DTYPE may help."
        )
    alone = " If it stays so, float16 overflows on this text by itself: ask without steering."
    return InvalidRequest(
        "The steered model's output is not finite: the strength is too large. Lower strength or multiplier."
        + alone * (dtype == torch.float16)
    )


def _no_distribution(spec: RowSpec) -> Exception:
    sampling = spec.sampling
    return EngineFailed(
        f"No token can be drawn with temperature {sampling.temperature:g} and freq_penalty {sampling.freq_penalty:g}: "
        "their numbers leave the range of float32."
    )
