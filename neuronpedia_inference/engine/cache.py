"""Keys and values of rows that decode together: one slot per row, written in place, each at its own length.

Rows are left-aligned: position p of a row is column p of its slot. So a row joins, decodes and leaves without moving
the others' past, and a step's mask says only how long each row is. Two invariants make a row's result its own: a live
row's columns behind its length are zero until they are written, and no query ever sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

COLUMNS_AT_ONCE = 64
"""Slots grow in steps of this many positions."""

Inputs = dict[str, Any]
"""Arguments of the model's forward beside the ids."""


class RowMemory(Protocol):
    """What a lane needs of a cache."""

    def prefill(self, lengths: Sequence[int], n_columns: int) -> Any:
        """Context: the forward pass inside, over right-padded prompts of these lengths, becomes new rows.

        `n_columns`: positions that the longest of them may reach. Gives the forward's `Inputs`.
        """
        ...

    def decode(self) -> Any:
        """Context: the forward pass inside adds one position to every row. Gives the forward's `Inputs`."""
        ...

    def drop(self, row: int) -> None:
        """Free a row; the last row takes its place."""
        ...


class RowCache(Cache):
    """Slots for any number of rows. A forward pass that raises leaves the rows as they were."""

    def __init__(
        self, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, stays: bool = False
    ) -> None:
        """`stays`: the slots are kept when the last row leaves, at the addresses that they have."""
        text: Any = config.get_text_config()
        super().__init__(layers=[_Slots(self) for _ in range(text.num_hidden_layers)])
        self._dtype, self._device = dtype, device
        self._window: int | None = text.sliding_window if slides(text) else None
        self._stays = stays
        self.lengths: list[int] = []
        """Positions of every row."""
        self.new: list[int] = []
        """Lengths of the prompts in the prefill under way."""
        self.n_columns = 0
        """Positions that every slot has room for."""
        self.positions = torch.empty(0, dtype=torch.long, device=device)
        """[row]: the column that the decode step under way writes."""
        self.n_seen = 0
        """Columns that its queries may see."""
        self._is_whole = False

    @contextmanager
    def prefill(self, lengths: Sequence[int], n_columns: int) -> Iterator[Inputs]:
        """The prompts attend to themselves alone, so causal order is all the mask that they need."""
        rounded = -(-n_columns // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
        self.n_columns = max(self.n_columns, rounded)
        self.new = list(lengths)
        try:
            yield {"past_key_values": self}
            self.lengths += self.new
        finally:
            self.new = []

    @contextmanager
    def decode(self) -> Iterator[Inputs]:
        self.positions = torch.tensor(self.lengths, device=self._device)
        self.n_seen, self._is_whole = max(self.lengths) + 1, False
        yield {
            "past_key_values": self,
            "position_ids": self.positions[:, None],
            "attention_mask": self.masks(),
        }
        self.lengths = [length + 1 for length in self.lengths]

    @contextmanager
    def decode_whole(self) -> Iterator[None]:
        """As `decode`, but every slot takes part at the full width, and the positions stay in one tensor."""
        n_slots, self.n_seen = self.shape
        if not self._is_whole or len(self.positions) != n_slots:
            self.positions = torch.zeros(n_slots, dtype=torch.long, device=self._device)
        self._is_whole = True
        self.positions.copy_(torch.tensor([*self.lengths, *[0] * (n_slots - len(self.lengths))]))
        yield
        self.lengths = [length + 1 for length in self.lengths]

    def drop(self, row: int) -> None:
        last = len(self.lengths) - 1
        for layer in self.layers:
            assert isinstance(layer, _Slots)
            layer.move(last, row)
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths and not self._stays:
            self.reset()
            self.n_columns = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Slots, and columns of each, that there are."""
        first = self.layers[0]
        assert isinstance(first, _Slots)
        keys = first.keys
        return (0, 0) if keys is None else (keys.shape[0], keys.shape[2])

    @property
    def n_slots(self) -> int:
        """Slots wanted for the rows and those in prefill: a power of two, so that growing is rare."""
        return 1 << (len(self.lengths) + len(self.new) - 1).bit_length()

    def masks(self) -> Any:
        """None where every row sees every column; else additive [row, 1, 1, column], by kind of layer if some slide."""
        window = self._window
        is_even = not self._is_whole and min(self.lengths) == self.n_seen - 1
        if is_even and (window is None or self.n_seen <= window):
            return None
        columns = torch.arange(self.n_seen, device=self._device)
        seen = columns <= self.positions[:, None]
        full = self._additive(seen)
        if window is None:
            return full
        return {
            "full_attention": full,
            "sliding_attention": self._additive(seen & (columns > self.positions[:, None] - window)),
        }

    def _additive(self, seen: Tensor) -> Tensor:
        """[row, column] of bool -> [row, 1, 1, column]"""
        hidden = torch.full(seen.shape, torch.finfo(self._dtype).min, dtype=self._dtype, device=self._device)
        return hidden.masked_fill_(seen, 0)[:, None, None]


class _Slots(CacheLayerMixin):
    """One layer: keys and values [slot, head, column, d_head]."""

    is_sliding = False

    def __init__(self, rows: RowCache) -> None:
        super().__init__()
        self._rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._grown(None, key_states)
        self.values = self._grown(None, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the new positions; give what the queries of this pass may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._rows.new:
            self.keys = self._with_prompts(self.keys, key_states)
            self.values = self._with_prompts(self.values, value_states)
            return key_states, value_states
        return self._with_step(self.keys, key_states), self._with_step(self.values, value_states)

    def get_seq_length(self) -> int:
        return 0 if self._rows.new else max(self._rows.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        if source != target:
            for held in (self.keys, self.values):
                assert held is not None
                held[target] = held[source]

    def _with_prompts(self, held: Tensor | None, new: Tensor) -> Tensor:
        """The slots with the prompts' states in those behind the rows, zeros behind each prompt's end."""
        held = self._grown(held, new)
        first, width = len(self._rows.lengths), new.shape[2]
        slots = held[first : first + len(new)]
        slots[:, :, :width] = new
        for slot, length in zip(slots, self._rows.new, strict=True):
            slot[:, length:] = 0
        return held

    def _with_step(self, held: Tensor | None, new: Tensor) -> Tensor:
        assert held is not None
        rows = self._rows
        slots = held[: len(new)]
        slots[torch.arange(len(new), device=new.device), :, rows.positions] = new[:, :, 0]
        return slots[:, :, : rows.n_seen]

    def _grown(self, held: Tensor | None, like: Tensor) -> Tensor:
        """The same slots with room for all rows at their full length."""
        n_slots, n_columns = self._rows.n_slots, self._rows.n_columns
        if held is not None and len(held) >= n_slots and held.shape[2] >= n_columns:
            return held
        if held is not None:
            n_slots, n_columns = max(n_slots, len(held)), max(n_columns, held.shape[2])
        grown = like.new_zeros(n_slots, like.shape[1], n_columns, like.shape[3])
        if held is not None:
            grown[: len(held), :, : held.shape[2]] = held
        return grown


class SoloCache:
    """One row with Hugging Face's own cache: for any model that decodes at all."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._inputs: Inputs = {"past_key_values": DynamicCache(config=config)}

    @contextmanager
    def prefill(self, lengths: Sequence[int], n_columns: int) -> Iterator[Inputs]:
        assert len(lengths) == 1, lengths
        yield self._inputs

    @contextmanager
    def decode(self) -> Iterator[Inputs]:
        yield self._inputs

    def drop(self, row: int) -> None:
        """The cache goes with its only row."""


def slides(config: Any) -> bool:
    """Whether some layers see only a window of the past."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())
