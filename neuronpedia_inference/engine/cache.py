"""Keys and values of rows that decode together: one slot per row, written in place, each at its own length.

Rows are left-aligned: position p of a row is column p of its slot. So a row joins, decodes and leaves without moving
the others' past, and a step's mask says only how long each row is. Two invariants make a row's result its own: a live
row's columns behind its length are zero until they are written, and no query ever sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from neuronpedia_inference.costs import COLUMNS_AT_ONCE
from neuronpedia_inference.engine.rotation import Rotation

ALL_LAYERS = "all"
SLIDING = "sliding_attention"

Inputs = dict[str, Any]
"""Arguments of the model's forward beside the ids."""


class MaskForm(StrEnum):
    """How a model is told what each row of a decode step may see."""

    ADDITIVE = "additive"
    """Numbers added to the scores, and the rows' positions."""
    LENGTHS = "lengths"
    """Which columns are filled; the model finds positions, or distances, from that."""


class RowMemory(Protocol):
    """What a lane needs of a cache."""

    @property
    def in_pieces(self) -> bool:
        """Whether prompts may be run in several passes."""
        ...

    def prompts(self, n_columns: int) -> Cache:
        """Where the keys and values of prompts of at most this many positions go until their rows join."""
        ...

    def is_outdated(self) -> bool:
        """Whether what is kept is of no use to the next position, so that the whole text must be run again."""
        ...

    def join(self, prompts: Cache, rows: Sequence[int], lengths: Sequence[int], n_columns: int) -> None:
        """These rows of `prompts`, of these lengths, become rows here; `prompts` is spent.

        `n_columns`: positions that the longest of them may reach. After an exception none has joined.
        """
        ...

    def decode(self) -> Any:
        """Context: the forward pass inside adds one position to every row. Gives the forward's `Inputs`."""
        ...

    def drop(self, row: int) -> None:
        """Free a row; the last row takes its place. After an exception it may be asked for again."""
        ...

    def clear(self) -> None:
        """Free all rows."""
        ...


class PromptCache(Cache):
    """Keys and values of right-padded prompts, from column 0 on, in as many passes as they take."""

    def __init__(self, config: PreTrainedConfig, n_columns: int) -> None:
        text: Any = config.get_text_config()
        super().__init__(layers=[_Columns(n_columns) for _ in range(text.num_hidden_layers)])


class _Columns(CacheLayerMixin):
    """One layer: keys and values [row, head, column, d_head]."""

    is_sliding = False

    def __init__(self, n_columns: int) -> None:
        super().__init__()
        self._n_columns = n_columns
        self._n_filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            new.new_empty(*new.shape[:2], self._n_columns, new.shape[3]) for new in (key_states, value_states)
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the new positions; give all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self._n_filled + key_states.shape[2]
        self.keys[:, :, self._n_filled : end] = key_states
        self.values[:, :, self._n_filled : end] = value_states
        self._n_filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values, which this layer gives up; None of a layer that attends to those of another."""
        if self.keys is None or self.values is None:
            return None
        taken = self.keys, self.values
        self.keys = self.values = None
        return taken

    def get_seq_length(self) -> int:
        return self._n_filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._n_filled + query_length, 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """Slots for any number of rows. A forward pass that raises leaves the rows as they were, and may be run again."""

    in_pieces = True

    def __init__(self, model: PreTrainedModel, form: MaskForm, *, stays: bool = False) -> None:
        """`stays`: the slots are kept when the last row leaves, at the addresses that they have."""
        text: Any = model.config.get_text_config()
        super().__init__(layers=[_Slots(self) for _ in range(text.num_hidden_layers)])
        self._config = model.config
        self._dtype, self._device = model.dtype, model.device
        self._form = form
        self._windows = windows(text)
        self._stays = stays
        self.lengths: list[int] = []
        """Positions of every row."""
        self.n_columns = 0
        """Positions that every slot has room for."""
        self.positions = torch.empty(0, dtype=torch.long, device=self._device)
        """[row]: the column that the decode step under way writes."""
        self.n_seen = 0
        """Columns that its queries may see."""
        self._is_whole = False
        self._whole_positions = self.positions
        """What `positions` is in whole steps: it stays where it is, whatever other steps are between them."""

    def prompts(self, n_columns: int) -> PromptCache:
        return PromptCache(self._config, n_columns)

    def is_outdated(self) -> bool:
        return False

    def join(self, prompts: Cache, rows: Sequence[int], lengths: Sequence[int], n_columns: int) -> None:
        n_columns = max(self.n_columns, -(-n_columns // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE)
        n_slots = _power_of_two(len(self.lengths) + len(rows))
        for slots, columns in zip(self.layers, prompts.layers, strict=True):
            assert isinstance(slots, _Slots)
            assert isinstance(columns, _Columns)
            taken = columns.take()
            if taken is not None:
                slots.join(*taken, rows, lengths, (n_slots, n_columns))
        self.n_columns = n_columns
        self.lengths += lengths

    @contextmanager
    def decode(self) -> Iterator[Inputs]:
        self.positions = torch.tensor(self.lengths, device=self._device)
        self.n_seen, self._is_whole = max(self.lengths) + 1, False
        yield self.inputs()
        self.lengths = [length + 1 for length in self.lengths]

    @contextmanager
    def decode_whole(self) -> Iterator[None]:
        """As `decode`, but every slot takes part at the full width, and the positions stay in one tensor."""
        n_slots, self.n_seen = self.shape
        if len(self._whole_positions) != n_slots:
            self._whole_positions = torch.zeros(n_slots, dtype=torch.long, device=self._device)
        self.positions, self._is_whole = self._whole_positions, True
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

    def clear(self) -> None:
        self.lengths = []
        if not self._stays:
            self.reset()
            self.n_columns = 0

    def inputs(self) -> Inputs:
        """Of the forward pass of a decode step."""
        positions = {} if self._form is MaskForm.LENGTHS else {"position_ids": self.positions[:, None]}
        return {"past_key_values": self, "attention_mask": self.masks(), **positions}

    @property
    def shape(self) -> tuple[int, int]:
        """Slots, and columns of each, that every layer has."""
        held: list[Tensor | None] = [layer.keys for layer in self.layers if isinstance(layer, _Slots)]
        shapes = [(len(keys), keys.shape[2]) for keys in held if keys is not None] or [(0, 0)]
        return min(slots for slots, _ in shapes), min(columns for _, columns in shapes)

    def held(self) -> list[Tensor]:
        """All that a whole step reads and writes here. A layer that has grown has got others."""
        slots = [(layer.keys, layer.values) for layer in self.layers if isinstance(layer, _Slots)]
        return [self._whole_positions, *(one for pair in slots for one in pair if one is not None)]

    def masks(self) -> Any:
        """What the queries of a step may see; None where every row sees every column.

        Additive [row, 1, 1, column], by kind of layer if kinds differ; with LENGTHS, [row, column] of 0 and 1.
        """
        least = min(filter(None, self._windows.values()), default=self.n_seen)
        is_even = not self._is_whole and min(self.lengths) == self.n_seen - 1
        if is_even and self.n_seen <= least:
            return None
        columns = torch.arange(self.n_seen, device=self._device)
        seen = columns <= self.positions[:, None]
        if self._form is MaskForm.LENGTHS:
            return seen.long()
        masks = {
            kind: self._additive(seen & (columns > self.positions[:, None] - window) if window else seen)
            for kind, window in self._windows.items()
        }
        return masks.get(ALL_LAYERS, masks)

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
        raise AssertionError("slots are made when rows join")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the new position of every row; give what the queries of this step may attend to."""
        return self._with_step(self.keys, key_states), self._with_step(self.values, value_states)

    def get_seq_length(self) -> int:
        return max(self._rows.lengths, default=0)

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
                if held is not None:
                    held[target] = held[source]

    def join(
        self, keys: Tensor, values: Tensor, rows: Sequence[int], lengths: Sequence[int], shape: tuple[int, int]
    ) -> None:
        """Rows of keys and values go into the slots behind those in use, zeros behind each one's length.

        `shape`: slots and columns to have room for. Nothing in use is touched, so this may fail and be repeated.
        """
        held_keys = self._with_prompts(_grown(self.keys, keys, shape), keys, rows, lengths)
        held_values = self._with_prompts(_grown(self.values, values, shape), values, rows, lengths)
        self.keys, self.values = held_keys, held_values  # both or neither: they have one shape
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def _with_prompts(self, held: Tensor, new: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
        first = len(self._rows.lengths)
        for slot, row, length in zip(held[first : first + len(rows)], rows, lengths, strict=True):
            slot[:, :length] = new[row, :, :length]
            slot[:, length:] = 0
        return held

    def _with_step(self, held: Tensor | None, new: Tensor) -> Tensor:
        assert held is not None
        rows = self._rows
        slots = held[: len(new)]
        slots[torch.arange(len(new), device=new.device), :, rows.positions] = new[:, :, 0]
        return slots[:, :, : rows.n_seen]


def _grown(held: Tensor | None, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """Slots with room for so many rows and columns: the same ones where they have it."""
    n_slots, n_columns = shape
    if held is not None and len(held) >= n_slots and held.shape[2] >= n_columns:
        return held
    if held is not None:
        n_slots, n_columns = max(n_slots, len(held)), max(n_columns, held.shape[2])
    grown = like.new_zeros(n_slots, like.shape[1], n_columns, like.shape[3])
    if held is not None:
        grown[: len(held), :, : held.shape[2]] = held
    return grown


def _power_of_two(n: int) -> int:
    """The least that is not below n, so that growing is rare."""
    return 1 << (n - 1).bit_length()


class SoloCache:
    """One row with Hugging Face's own cache: for any model that decodes at all."""

    in_pieces = False

    def __init__(self, config: PreTrainedConfig, rotation: Rotation) -> None:
        self._config = config
        self._rotation = rotation
        self._cache: Cache | None = None
        self._length = 0

    def prompts(self, n_columns: int) -> Cache:
        return DynamicCache(config=self._config)

    def is_outdated(self) -> bool:
        return self._rotation.outdates(self._length + 1)

    def join(self, prompts: Cache, rows: Sequence[int], lengths: Sequence[int], n_columns: int) -> None:
        assert list(rows) == [0], rows
        self._cache = prompts
        self._length = lengths[0]

    @contextmanager
    def decode(self) -> Iterator[Inputs]:
        yield {"past_key_values": self._cache}
        self._length += 1

    def drop(self, row: int) -> None:
        self.clear()

    def clear(self) -> None:
        self._cache = None


def windows(text: Any) -> dict[str, int]:
    """Positions that a query of each kind of layer sees at the most, 0 for all. One kind is ALL_LAYERS."""
    window: int = getattr(text, "sliding_window", None) or 0
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return {ALL_LAYERS: window}
    if SLIDING not in kinds:
        return {ALL_LAYERS: 0}
    return {"full_attention": 0, SLIDING: window}
