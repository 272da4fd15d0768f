"""What the scheduler asks of an engine. Satisfied by `engine.ModelEngine` and by a counting fake in the tests.

Left out on purpose: text (the tokenizer is the runtime's), SAEs (reductions get tensors), and threads: every call
comes from the one worker thread.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from neuronpedia_inference.domain import Numbers, Refusal, Sampling
from neuronpedia_inference.edits.rows import RowEdit, Trigger
from neuronpedia_inference.points import Point

if TYPE_CHECKING:
    from torch import Tensor

    from neuronpedia_inference.edits.made import MadeEdits
    from neuronpedia_inference.recent import Recent

NO_TOKEN = -1
"""In a step that drew none."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Sizes and facts of the loaded model."""

    id: str
    name: str
    """Where the weights came from."""
    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    context_length: int
    dtype: str
    device: str
    has_bos: bool
    has_chat_template: bool
    known_names: tuple[str, ...]
    """Names that a request's `model` may use for it."""


class Reading(Protocol):
    """A few numbers of every position, made on the device of what passes there. Nothing in it waits for the device."""

    @property
    def key(self) -> Hashable:
        """Readings with equal keys give equal numbers, and are made together."""
        ...

    @property
    def n_numbers(self) -> int:
        """Of every position."""
        ...

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """[pos, width] -> [pos, n_numbers], float32"""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """What is read of one row at a point: at every prompt position, and where each generated token is the input."""

    point: Point
    reading: Reading
    before: bool = False
    """Read twice: before the edits of this point, and behind them."""
    proves: bool = False
    """It only says what the row's edits do: zeros at prompt positions before the first that they select."""

    @property
    def n_numbers(self) -> int:
        return self.reading.n_numbers * (2 if self.before else 1)


class Lookout(Protocol):
    """What a rule has seen of one text."""

    def see(self, numbers: Numbers, ids: Sequence[int], /) -> bool:
        """What was read at the next positions, [pos, n] as in `RowStep.numbers`, and their tokens; whether to act."""
        ...

    def forget(self, n_positions: int, /) -> None:
        """The newest positions are not there any more."""
        ...


@dataclass(frozen=True, slots=True)
class Retry:
    """The newest tokens are taken back, and others drawn in their place."""

    back: int
    """Tokens; fewer where fewer are held back: a token that so many follow stays."""
    times: int
    """In one text; after that the text ends before them."""


class Rule(Protocol):
    """Acts on a text at a token for what was read there."""

    @property
    def retry(self) -> Retry | None:
        """None: the token is kept, and the last."""
        ...

    def begin(self) -> Lookout: ...


class StopReader(Protocol):
    """What has been written of one text."""

    def ends_at(self, token_id: int, /) -> bool:
        """Whether the next token ends it."""
        ...


class Stops(Protocol):
    """Ends a text at a token for what is written."""

    def begin(self) -> StopReader: ...


@dataclass(frozen=True, slots=True)
class RowSpec:
    """One sequence to generate, or to read."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    edits: tuple[RowEdit, ...] = ()
    watches: tuple[Watch, ...] = ()
    tells_edits: bool = False
    """What its edits find and do is read too, in front of what is watched: see `edits.record`."""
    rules: tuple[Rule, ...] = ()
    """On what the watches read. A token is told once the rules have seen it."""
    stops: Stops | None = None
    n_generated: int = 0
    """Of the ids, how many at the end were generated: of a text that is run again."""
    read_from: int = 0
    """The watches read no position before it."""
    weight: float = 1.0
    """What a position of it costs with all that is read there, in positions of a bare pass."""
    made: MadeEdits | None = None
    """Of its edits, when it begins. The row's own."""

    @property
    def n_prompt(self) -> int:
        return len(self.prompt_ids) - self.n_generated

    @property
    def is_read(self) -> bool:
        """Whether numbers are read at its positions."""
        return bool(self.watches) or (self.tells_edits and bool(self.edits))

    @property
    def readings(self) -> list[tuple[Watch, bool]]:
        """What is read at a position, behind what its edits tell: of each watch, whether it is before the edits."""
        return [
            (watch, is_before) for watch in self.watches for is_before in ((True, False) if watch.before else (False,))
        ]

    @property
    def acts_from(self) -> int:
        """The first position of the prompt that one of its edits selects; the prompt's length where none does."""
        places, ids = np.arange(self.n_prompt), np.array(self.prompt_ids[: self.n_prompt])
        selections = dict.fromkeys(edit.on for edit in self.edits)
        selected = [selection.weights(places, ids, self.n_prompt) > 0 for selection in selections]
        return min((int(one.argmax()) for one in selected if one.any()), default=self.n_prompt)

    @property
    def triggers(self) -> list[Trigger]:
        """What its edits wait for."""
        gates = [edit.when for edit in self.edits if edit.when is not None]
        return list(dict.fromkeys(trigger for gate in gates for trigger in gate.triggers.values()))


def only_read(prompt_ids: Sequence[int]) -> RowSpec:
    """A text that passes as it is, and is not gone on with."""
    return RowSpec(tuple(prompt_ids), Sampling(max_new_tokens=0))


class RowId(NamedTuple):
    """Which row of which job."""

    job: int
    place: int


@dataclass(frozen=True, slots=True)
class RowStep:
    """What one step gave one row: a token, or the error that ends it.

    The numbers at a token are known once it has been the input: a watched row takes one step more, without a token.
    """

    row: RowId
    token_id: int
    """NO_TOKEN with an error, and in the last step of a watched row."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest candidates."""
    finish_reason: str | None = None
    error: Exception | None = None
    numbers: Numbers | None = field(default=None, compare=False)
    """[pos, n]: what was read at the positions that this step ran, watch by watch, `before` first."""
    is_awaited: bool = False
    """With a row's last token: what is read there is still to come, in a step of its own."""
    rule: int | None = None
    """The rule that ended the row at this token, with finish_reason "stop_rule"."""
    refusal: Refusal | None = None
    """Tokens that nobody was told of were taken back."""

    @property
    def says_something(self) -> bool:
        """False of a row that has stepped, and holds back what it has got."""
        told = (self.finish_reason, self.error, self.numbers, self.refusal)
        return self.token_id != NO_TOKEN or any(one is not None for one in told)

    @property
    def ends(self) -> bool:
        """Whether the row has left its lane."""
        return self.error is not None or (self.finish_reason is not None and not self.is_awaited)


Captured = Mapping[Point, "Tensor"]


class Pass(Protocol):
    """Prompts on their way through the model."""

    @property
    def n_tokens(self) -> int:
        """Of all prompts, padding included."""
        ...

    @property
    def is_done(self) -> bool: ...

    def advance(self, n_tokens: int) -> int:
        """Run about so many tokens more; how many it were. After an exception the pass is of no more use."""
        ...


class Joining(Pass, Protocol):
    """A pass whose rows go on to decode."""

    @property
    def n_padding(self) -> int: ...

    @property
    def weight(self) -> float:
        """What a token costs with all that is read there, in tokens of a bare pass."""
        ...

    def join(self) -> list[RowStep]:
        """Once it is done: the rows join their lane, with the first token of each. After an exception none has."""
        ...


class Capturing(Pass, Protocol):
    """A pass that is only read."""

    @property
    def depth(self) -> float:
        """Share of the layers that it runs."""
        ...

    def result(self) -> list[Captured]:
        """Once it is done: per prompt and point, [pos, width] (pattern and values keep heads)."""
        ...


class Lane(Protocol):
    """Rows that decode together. They join once their prompts have been run, and leave as they end or are dropped."""

    @property
    def rows(self) -> Sequence[RowId]: ...

    @property
    def decoding(self) -> Sequence[RowId]:
        """Those of them that are not parked."""
        ...

    def begin(self, rows: Sequence[tuple[RowId, RowSpec]]) -> Joining:
        """Rows that will join once their prompts have been run. After an exception nothing has begun."""
        ...

    def decode(self) -> list[RowStep]:
        """One token for every row that is not parked. After an exception all are as they were: try it again."""
        ...

    def park(self, rows: Collection[RowId]) -> None:
        """They keep what they have, and draw nothing until they are resumed. Cannot fail."""
        ...

    def resume(self, rows: Collection[RowId]) -> None:
        """They decode again. Cannot fail."""
        ...

    def drop(self, rows: Collection[RowId]) -> None:
        """Rows leave; ids of rows that are not here are ignored. Cannot fail."""
        ...


class Engine(Protocol):
    recent: Recent
    """What is kept of prompts, to be used again."""

    def begin_capture(
        self, rows: Sequence[RowSpec], points: Collection[Point], *, reproducible: bool = False
    ) -> Capturing:
        """One forward pass over the prompts of all rows, edited as these say, ended at the last point."""
        ...

    @property
    def reproducible_lane(self) -> Lane:
        """Where rows run whose tokens must not depend on others."""
        ...

    @property
    def lane(self) -> Lane:
        """Where all rows decode."""
        ...
