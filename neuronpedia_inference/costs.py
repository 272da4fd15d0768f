"""What a request takes, in numbers that admission can add up. Arithmetic over sizes; no tensors.

generation   the pass over its prompt, and 512 + 400 × log-probabilities for every new token on its way to the caller,
             those that rules may take back among them (back × times), and 96 for every number of the vectors that came
             with it and every number that is read while it runs; the reduction of the largest source that is read
             whole for that; and for a lens 12 × logits of as many positions as 2²³ have room for, with
             Jacobians 4 × d_model × (d_model + 2 × tokens) more
             edits     48 × d_model + 32 × prompt tokens for each, and 24 × d_model × prompt tokens where there are any:
                       their vectors in two tables, numbers and weights by position, and states in float32. Each
                       counts twice where what it does is read for a receipt
all of them  1.2 × slots × columns × cache bytes of a position: rows of different requests lie in one grid, as wide as
             the longest of them may become. So a long request makes room for every row that is inside with it
             slots     all rows and one more, in steps of a quarter of a power of two
             columns   prompt and completion, likewise in units of 64
             cache     2 × layers × key-value heads × d_head × bytes of the model's precision
capture      tokens × width of every point × bytes, the pass over its prompts, edits as above, the reduction, its
             results, and 256 KiB for the pieces of the answer that are on their way to the caller
reduction    one prompt and one source at a time, in float32 and in blocks of features: 6 × block + 16 × pos × width
             bytes; 8 × pos × F more for architectures that compare features (TopK and others), 16 MiB more for gated,
             40 × pos × F and 12 × heads × pos² for temporal
             block     4 bytes × min(pos × F, max(2²², 256 × pos)), of F features at pos positions
score        a capture behind the last block; 24 × logits of as many positions as 2²⁰ have room for, and 16 for every
             number of the answer
sweep        what it keeps until its answer is whole, beside each of its generations: 512 for every new token, and 96
             for every number that is watched
results      bytes of a value, while it is found, merged and kept: 64 in a top-k, 40 in a ranking, 48 of what is active
pass         tokens × (8 × d_model + 4 × d_mlp) × bytes, and the cache bytes of each; where attention makes its pattern,
             5 × rows × heads × longest² × 4 more, and once × bytes for every pattern that is kept

The pass is an estimate from above for the families whose tests measure it; the rest is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Source, Tokens

if TYPE_CHECKING:
    from neuronpedia_inference.engine.protocol import ModelInfo

COLUMNS_AT_ONCE = 64
"""Positions by which the cache grows."""
SPARE = 1.2
"""What is admitted for slots, by what their rows need."""
KEPT_SHARE = 1.4
"""Slots are given back where they are more than this by what their rows need."""
TOKEN_BYTES, LOGPROB_BYTES = 512, 400
"""Of a new token, and of each candidate reported with it, as steps, as text and as JSON."""
NUMBER_BYTES = 96
"""Of a number that a caller sent: in the body, as it is read and checked, and in a tensor; or of one that was read for
it: in a tensor, as a number and as JSON."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number, by precision."""
BLOCK_ELEMENTS = 2**22
"""Activations computed at once: 16 MiB in float32."""
LOGITS_AT_ONCE = 2**20
"""Logits made at once where tokens are scored, in about the time of a step: 4 MiB in float32."""
READ_OUT_AT_ONCE = 2**23
"""Logits of a lens made at once: for each block as few passes over the unembedding as there are such parts."""
COPIED_NUMBERS = 2**22
"""Weights of a gated encoder that are scaled at once."""
TOP_BYTES, RANKED_BYTES, ACTIVE_BYTES = 64, 40, 48
"""Of a value in an answer, while it is found, merged and kept."""
LOGIT_BYTES, SCORED_BYTES = 24, 16
"""Of a logit that is made: in the model's precision and in float32, capped, and while it is summed up; and of a number
that is told of tokens."""
READ_OUT_BYTES = 12
"""Of a logit of a lens: in the model's precision and in float32, which may have to be put together."""
SENDING_BYTES = 2**18
"""Of the pieces of an answer that are on their way."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Slots for rows, and positions that each of them has room for."""

    slots: int = 0
    columns: int = 0

    @classmethod
    def of(cls, n_rows: int, n_positions: int) -> Grid:
        """For so many rows, none of them longer; both in steps of a quarter, so that growing is rare."""
        return cls(_in_quarters(n_rows), COLUMNS_AT_ONCE * _in_quarters(-(-n_positions // COLUMNS_AT_ONCE)))

    @property
    def positions(self) -> int:
        return self.slots * self.columns

    def joined(self, other: Grid) -> Grid:
        """The least that holds both."""
        return Grid(max(self.slots, other.slots), max(self.columns, other.columns))

    def is_far_beyond(self, other: Grid) -> bool:
        """Whether it takes so much more that it is worth making anew."""
        return self.positions > KEPT_SHARE * other.positions


def _in_quarters(n: int) -> int:
    """The least number not below n that a quarter of a power of two divides: 1, 2, ... 8, 10, 12, 14, 16, 20, ..."""
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return -(-n // step) * step


NO_GRID = Grid()
RECORDED_GRID = Grid(slots=16, columns=512)
"""What is kept when rows leave, where steps are recorded: recordings belong to these tensors."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request takes while it is inside, or what a server has for all of them."""

    requests: int = 1
    rows: int = 0
    """Sequences to generate."""
    tokens: int = 0
    """Prompt tokens to run through the model."""
    bytes: int = 0
    """Memory at the most; of a request, without its rows' keys and values."""
    positions: int = 0
    """That one of its rows may reach."""

    def at_least(self, other: Demand) -> Demand:
        """Room for either: of what comes one after the other."""
        return Demand(**{f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(Demand)})

    def beyond(self, bounds: Demand) -> str | None:
        """The first bound that is broken, by name."""
        return next((name for name in BOUNDS if getattr(self, name) > getattr(bounds, name)), None)


BOUNDS = ("requests", "rows", "tokens", "bytes")


def together(demands: Iterable[Demand], position_bytes: int, least: Grid = NO_GRID) -> Demand:
    """What all of them take, keys and values included.

    position_bytes: of one position of one row; `least`: what is kept when nobody is inside.
    """
    every = list(demands)
    total = {f.name: sum(getattr(one, f.name) for one in every) for f in fields(Demand)}
    longest = max((one.positions for one in every), default=0)
    needed = Grid.of(total["rows"] + 1, longest) if longest else NO_GRID
    held = max(least.positions, int(SPARE * needed.joined(least).positions) if longest else 0)
    return Demand(**{**total, "bytes": total["bytes"] + held * position_bytes, "positions": longest})


def cache_numbers(n_layers: int, n_key_value_heads: int, d_head: int) -> int:
    """Keys and values of one position of one row."""
    return 2 * n_layers * n_key_value_heads * d_head


def peak_bytes(source: Source, n_positions: int) -> int:
    """Memory that reducing one prompt takes at the most, its results aside."""
    every = n_positions * source.n_features
    block = min(every, max(BLOCK_ELEMENTS, 256 * n_positions))
    compared = 0 if source.is_read_by_column else (40 if source.is_temporal else 8) * every
    attended = 12 * source.n_heads * n_positions * n_positions
    copied = 4 * COPIED_NUMBERS if source.architecture == "gated" else 0
    return 24 * block + 16 * n_positions * source.width + compared + copied + attended


def reduce_bytes(prompts: Sequence[Tokens], sources: Sequence[Source]) -> int:
    """Of one prompt and one source at a time, and of what is on its way to the caller."""
    longest = max(map(len, prompts), default=0)
    return SENDING_BYTES + max((peak_bytes(source, longest) for source in sources), default=0)


def score_bytes(vocab_size: int, n_numbers: int) -> int:
    """Of making so many numbers of logits, and of telling them."""
    return SENDING_BYTES + LOGIT_BYTES * max(vocab_size, LOGITS_AT_ONCE) + SCORED_BYTES * n_numbers


def kept_bytes(n_tokens: int, n_numbers: int) -> int:
    """Of so many tokens that have been written, and numbers that have been read of them, until the answer is whole."""
    return TOKEN_BYTES * n_tokens + NUMBER_BYTES * n_numbers


@dataclass(frozen=True)
class Costs:
    """Demands of requests to one model."""

    model: ModelInfo

    @property
    def position_bytes(self) -> int:
        """Keys and values of one position of one row."""
        model = self.model
        return cache_numbers(model.n_layers, model.n_key_value_heads, model.d_head) * ITEM_BYTES[model.dtype]

    def generation(
        self,
        n_rows: int,
        n_prompt_tokens: int,
        n_new_tokens: int,
        *,
        n_logprobs: int = 0,
        n_numbers: int = 0,
        n_edits: int = 0,
        n_read: int = 0,
        read_whole: Sequence[Source] = (),
        reads_out: bool = False,
        jacobians: bool = False,
        pattern: bool,
    ) -> Demand:
        """Rows that share a prompt. n_numbers: of the vectors that came with the request. n_edits: of all rows. n_read:
        numbers that are read while they run. read_whole: sources all of whose features are computed for that.
        reads_out: logits are made too; jacobians: of what has gone through one of these."""
        tokens = n_rows * n_prompt_tokens
        told = n_rows * n_new_tokens * (TOKEN_BYTES + n_logprobs * LOGPROB_BYTES) + n_read * NUMBER_BYTES
        n_vocab = self.model.vocab_size
        read = max((peak_bytes(source, tokens) for source in read_whole), default=0)
        read += READ_OUT_BYTES * min(tokens * n_vocab, max(READ_OUT_AT_ONCE, n_vocab)) if reads_out else 0
        read += 4 * self.model.d_model * (self.model.d_model + 2 * tokens) if jacobians else 0
        edited = self._edited([n_prompt_tokens] * n_rows, n_edits, n_numbers)
        taken = told + read + edited + self._pass([n_prompt_tokens] * n_rows, pattern=pattern)
        return Demand(rows=n_rows, tokens=tokens, bytes=taken, positions=n_prompt_tokens + n_new_tokens)

    def capture(
        self,
        lengths: Sequence[int],
        widths: Sequence[int],
        reduce_bytes: int,
        *,
        pattern: bool,
        n_patterns: int = 0,
        n_edits: int = 0,
        n_numbers: int = 0,
    ) -> Demand:
        """Prompts of these lengths, read at points of these widths, and at `n_patterns` attention patterns; edits as of
        a generation."""
        padded, item = len(lengths) * max(lengths), ITEM_BYTES[self.model.dtype]
        held = padded * (sum(widths) + n_patterns * self.model.n_heads * max(lengths)) * item
        taken = held + self._pass(lengths, pattern=pattern) + self._edited(lengths, n_edits, n_numbers)
        return Demand(tokens=sum(lengths), bytes=taken + reduce_bytes)

    def _edited(self, lengths: Sequence[int], n_edits: int, n_numbers: int) -> int:
        """Of prompts of these lengths, with so many edits in all and the numbers of the vectors that came with them."""
        longest = max(lengths)
        weights = n_edits * (48 * self.model.d_model + 32 * longest) + n_numbers * NUMBER_BYTES
        return weights + (24 * self.model.d_model * len(lengths) * longest if n_edits else 0)

    def _pass(self, lengths: Sequence[int], *, pattern: bool) -> int:
        model, longest = self.model, max(lengths)
        padded = len(lengths) * longest
        scores = 5 * padded * model.n_heads * longest * 4 if pattern else 0
        states = padded * (8 * model.d_model + 4 * model.d_mlp) * ITEM_BYTES[model.dtype]
        return states + padded * self.position_bytes + scores
