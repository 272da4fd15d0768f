"""What a request takes, in numbers that admission can add up. Arithmetic over sizes; no tensors.

generation   slots × columns × cache bytes of a position, the pass over its prompt, and 512 + 400 × log-probabilities
             for every new token on its way to the caller, and 96 for every number of the vectors that came with it
             slots     the next power of two of its rows, doubled while the cache grows
             columns   prompt and completion, in whole steps of 64
             cache     2 × layers × key-value heads × d_head × bytes of the model's precision
capture      tokens × width of every point × bytes, the pass over its prompts, the reduction, its results, and 256 KiB
             for the pieces of the answer that are on their way to the caller
reduction    one prompt and one source at a time, in float32 and in blocks of features: 6 × block + 16 × pos × width
             bytes; 8 × pos × F more for architectures that compare features (TopK and others), 16 MiB more for gated
             block     4 bytes × min(pos × F, max(2²², 256 × pos)), of F features at pos positions
results      bytes of a value, while it is found, merged and kept: 64 in a top-k, 40 in a ranking, 48 of what is active
pass         tokens × (8 × d_model + 4 × d_mlp) × bytes, and the cache bytes of each; where attention makes its pattern,
             5 × rows × heads × longest² × 4 more, and once × bytes for every pattern that is kept

The pass is an estimate from above for the families whose tests measure it; the rest is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from neuronpedia_inference.domain import Source, Tokens
from neuronpedia_inference.engine.protocol import ModelInfo

COLUMNS_AT_ONCE = 64
"""Positions by which the cache grows."""
TOKEN_BYTES, LOGPROB_BYTES = 512, 400
"""Of a new token, and of each candidate reported with it, as steps, as text and as JSON."""
NUMBER_BYTES = 96
"""Of a number that a caller sent: in the body, as it is read and checked, and in a tensor."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number, by precision."""
BLOCK_ELEMENTS = 2**22
"""Activations computed at once: 16 MiB in float32."""
COPIED_NUMBERS = 2**22
"""Weights of a gated encoder that are scaled at once."""
TOP_BYTES, RANKED_BYTES, ACTIVE_BYTES = 64, 40, 48
"""Of a value in an answer, while it is found, merged and kept."""
SENDING_BYTES = 2**18
"""Of the pieces of an answer that are on their way."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request takes while it is inside, or what a server has for all of them."""

    requests: int = 1
    rows: int = 0
    """Sequences to generate."""
    tokens: int = 0
    """Prompt tokens to run through the model."""
    bytes: int = 0
    """Memory at the most."""

    def __add__(self, other: Demand) -> Demand:
        return self._with(other, 1)

    def __sub__(self, other: Demand) -> Demand:
        return self._with(other, -1)

    def beyond(self, bounds: Demand) -> str | None:
        """The first bound that is broken, by name."""
        return next((f.name for f in fields(self) if getattr(self, f.name) > getattr(bounds, f.name)), None)

    def _with(self, other: Demand, sign: int) -> Demand:
        return Demand(*(getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self)))


def cache_numbers(n_layers: int, n_key_value_heads: int, d_head: int) -> int:
    """Keys and values of one position of one row."""
    return 2 * n_layers * n_key_value_heads * d_head


def peak_bytes(source: Source, n_positions: int) -> int:
    """Memory that reducing one prompt takes at the most, its results aside."""
    every = n_positions * source.n_features
    block = min(every, max(BLOCK_ELEMENTS, 256 * n_positions))
    compared = 0 if source.is_read_by_column else 8 * every
    copied = 4 * COPIED_NUMBERS if source.architecture == "gated" else 0
    return 24 * block + 16 * n_positions * source.width + compared + copied


def reduce_bytes(prompts: Sequence[Tokens], sources: Sequence[Source]) -> int:
    """Of one prompt and one source at a time, and of what is on its way to the caller."""
    longest = max(map(len, prompts), default=0)
    return SENDING_BYTES + max((peak_bytes(source, longest) for source in sources), default=0)


@dataclass(frozen=True)
class Costs:
    """Demands of requests to one model."""

    model: ModelInfo

    @property
    def position_bytes(self) -> int:
        """Keys and values of one position of one row."""
        model = self.model
        return cache_numbers(model.n_layers, model.n_key_value_heads, model.d_head) * ITEM_BYTES[model.dtype]

    @property
    def slot_position_bytes(self) -> int:
        """The same, with the slots that are held beside those in use."""
        return 2 * self.position_bytes

    def generation(
        self,
        n_rows: int,
        n_prompt_tokens: int,
        n_new_tokens: int,
        *,
        n_logprobs: int = 0,
        n_numbers: int = 0,
        pattern: bool,
    ) -> Demand:
        """Rows that share a prompt. n_numbers: of the vectors that came with the request."""
        slots = 2 * (1 << (n_rows - 1).bit_length())
        columns = -(-(n_prompt_tokens + n_new_tokens) // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
        tokens = n_rows * n_prompt_tokens
        held = slots * columns * self.position_bytes
        told = n_rows * n_new_tokens * (TOKEN_BYTES + n_logprobs * LOGPROB_BYTES)
        taken = held + told + n_numbers * NUMBER_BYTES + self._pass([n_prompt_tokens] * n_rows, pattern=pattern)
        return Demand(rows=n_rows, tokens=tokens, bytes=taken)

    def capture(
        self, lengths: Sequence[int], widths: Sequence[int], reduce_bytes: int, *, pattern: bool, n_patterns: int = 0
    ) -> Demand:
        """Prompts of these lengths, read at points of these widths, and at `n_patterns` attention patterns."""
        padded, item = len(lengths) * max(lengths), ITEM_BYTES[self.model.dtype]
        held = padded * (sum(widths) + n_patterns * self.model.n_heads * max(lengths)) * item
        return Demand(tokens=sum(lengths), bytes=held + self._pass(lengths, pattern=pattern) + reduce_bytes)

    def _pass(self, lengths: Sequence[int], *, pattern: bool) -> int:
        model, longest = self.model, max(lengths)
        padded = len(lengths) * longest
        scores = 5 * padded * model.n_heads * longest * 4 if pattern else 0
        states = padded * (8 * model.d_model + 4 * model.d_mlp) * ITEM_BYTES[model.dtype]
        return states + padded * self.position_bytes + scores
