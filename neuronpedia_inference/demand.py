"""What a request takes, in numbers that admission can add up. Arithmetic over the model's sizes; no tensors.

generation   slots × columns × cache bytes of a position, the pass over its prompt, and 512 + 400 × log-probabilities
             for every new token on its way to the caller, and 96 for every number of the vectors that came with it
             slots     the next power of two of its rows, doubled while the cache grows
             columns   prompt and completion, in whole steps of 64
             cache     2 × layers × key-value heads × d_head × bytes of the model's precision
capture      tokens × width of every point × bytes, the pass over its prompts, the reduction (`saes/reduce.py`) and its
             results with the pieces that are on their way to the caller (`features.py`)
pass         tokens × (8 × d_model + 4 × d_mlp) × bytes, and the cache bytes of each; where attention makes its pattern,
             5 × rows × heads × longest² × 4 more, and once × bytes for every pattern that is kept

The pass is an estimate from above for the families whose tests measure it; the rest is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuronpedia_inference.engine.protocol import ModelInfo
from neuronpedia_inference.scheduler.admission import Demand

COLUMNS_AT_ONCE = 64
"""Positions by which the cache grows."""
TOKEN_BYTES, LOGPROB_BYTES = 512, 400
"""Of a new token, and of each candidate reported with it, as steps, as text and as JSON."""
NUMBER_BYTES = 96
"""Of a number that a caller sent: in the body, as it is read and checked, and in a tensor."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number, by precision."""


@dataclass(frozen=True)
class Costs:
    """Demands of requests to one model."""

    model: ModelInfo

    @property
    def position_bytes(self) -> int:
        """Keys and values of one position of one row."""
        model = self.model
        return 2 * model.n_layers * model.n_key_value_heads * model.d_head * ITEM_BYTES[model.dtype]

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
