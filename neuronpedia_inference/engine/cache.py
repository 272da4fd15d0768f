"""Keys and values of rows that decode together: one slot per row, written in place, each at its own length.

Rows are left-aligned: position p of a row is column p of its slot. So a row joins, decodes and leaves without moving
the others' past, and a step's mask says only how long each row is. Two invariants make a row's result its own: a live
row's columns behind its length are zero until they are written, and no query ever sees them.

Whose a slot is and how long its row is, the lane knows; here is only what was asked for. The first slots decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from neuronpedia_inference.costs import NO_GRID, Grid
from neuronpedia_inference.engine.prefixes import Layers
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

    def is_outdated(self, length: int) -> bool:
        """Whether what is kept of so many positions is of no use to the next, so that the text must be run again."""
        ...

    def grow(self, grid: Grid) -> None:
        """Room for this in every layer, beside what is there. After an exception nothing is lost."""
        ...

    def grow_ahead(self, grid: Grid, n_steps: int) -> None:
        """As `grow`, a part in each of so many calls, so that no step waits for all of it."""
        ...

    def trim(self, grid: Grid) -> None:
        """Give back what is far more than this; slots behind it are free. After an exception nothing is lost."""
        ...

    def put(self, prompts: Cache, rows: Sequence[int], lengths: Sequence[int], first: int) -> None:
        """These rows of `prompts`, of these lengths, into the slots from `first` on, which are free and there."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a slot to a free one. May be repeated."""
        ...

    def cut(self, slot: int, length: int) -> None:
        """Of a slot's positions no more than these are there. May be repeated."""
        ...

    def layers_of(self, slot: int, length: int) -> Layers | None:
        """Views of a slot's first columns; None where a row cannot begin with another's."""
        ...

    def decode(self, lengths: Sequence[int]) -> AbstractContextManager[Inputs]:
        """The forward pass inside adds one position to the first slots, which have these lengths.

        After an exception it may be run again.
        """
        ...

    def clear(self) -> None:
        """All slots are free."""
        ...


class PromptCache(Cache):
    """Keys and values of right-padded prompts, from column 0 on, in as many passes as they take."""

    def __init__(self, config: PreTrainedConfig, n_columns: int) -> None:
        text: Any = config.get_text_config()
        super().__init__(layers=[_Columns(n_columns) for _ in range(text.num_hidden_layers)])

    def begin_with(self, prompts: Sequence[Layers], length: int) -> None:
        """The first positions of every prompt, which are not run."""
        for columns, of_layer in zip(self.layers, zip(*prompts, strict=True), strict=True):
            assert isinstance(columns, _Columns)
            there = [layer for layer in of_layer if layer is not None]
            if there:
                keys, values = ([kept[:, :length] for kept in side] for side in zip(*there, strict=True))
                columns.update(_side_by_side(keys), _side_by_side(values))


def _side_by_side(prompts: Sequence[Tensor]) -> Tensor:
    """[head, pos, d_head] of each -> [prompt, head, pos, d_head]; no copy of one alone."""
    return prompts[0][None] if len(prompts) == 1 else torch.stack(list(prompts))


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
    """Slots for any number of rows."""

    in_pieces = True

    def __init__(self, model: PreTrainedModel, form: MaskForm, least: Grid = NO_GRID) -> None:
        """`least`: what stays when rows leave, at the addresses that it has."""
        text: Any = model.config.get_text_config()
        super().__init__(layers=[_Slots(self) for _ in range(text.num_hidden_layers)])
        self._config = model.config
        self._dtype, self._device = model.dtype, model.device
        self._form = form
        self._windows = windows(text)
        self._least = least
        self._wanted = least
        """What layers get that hold nothing yet."""
        self.lengths: Sequence[int] = ()
        """Positions of the rows of the decode step under way."""
        self.positions = torch.empty(0, dtype=torch.long, device=self._device)
        """[row]: the column that it writes."""
        self.n_seen = 0
        """Columns that its queries may see."""
        self._is_whole = False
        self._whole_positions = self.positions
        """[slot]: what `positions` is in whole steps. It stays where it is, whatever other steps are between them."""

    def prompts(self, n_columns: int) -> PromptCache:
        return PromptCache(self._config, n_columns)

    def is_outdated(self, length: int) -> bool:
        return False

    @property
    def grid(self) -> Grid:
        """Slots, and columns of each, that every layer has."""
        held = [layer.grid for layer in self._slots if layer.grid is not None] or [NO_GRID]
        return Grid(min(one.slots for one in held), min(one.columns for one in held))

    def grow(self, grid: Grid) -> None:
        self._wanted = grid.joined(self.grid).joined(self._least)
        for layer in self._slots:
            layer.grow(self._wanted)

    def grow_ahead(self, grid: Grid, n_steps: int) -> None:
        small = [one for one in self._slots if one.grid is not None and one.grid != one.grid.joined(grid)]
        for layer in small[: -(-len(small) // n_steps)]:
            layer.grow(grid)

    def trim(self, grid: Grid) -> None:
        wanted = grid.joined(self._least)
        if self.grid.is_far_beyond(wanted):
            self._wanted = wanted
            for layer in self._slots:
                layer.resize(wanted)

    def put(self, prompts: Cache, rows: Sequence[int], lengths: Sequence[int], first: int) -> None:
        for slots, columns in zip(self._slots, prompts.layers, strict=True):
            assert isinstance(columns, _Columns)
            taken = columns.take()
            if taken is not None:
                slots.put(*taken, rows, lengths, first, self._wanted)

    def move(self, source: int, target: int) -> None:
        for layer in self._slots:
            layer.move(source, target)

    def cut(self, slot: int, length: int) -> None:
        for layer in self._slots:
            layer.cut(slot, length)

    def layers_of(self, slot: int, length: int) -> Layers | None:
        return [layer.view(slot, length) for layer in self._slots]

    @contextmanager
    def decode(self, lengths: Sequence[int]) -> Iterator[Inputs]:
        self.lengths = lengths
        self.positions = torch.tensor(lengths, device=self._device)
        self.n_seen, self._is_whole = max(lengths) + 1, False
        yield self.inputs()

    def begin_whole(self, lengths: Sequence[int], n_slots: int) -> None:
        """As `decode`, but the first `n_slots` take part at the full width, and the positions stay in one tensor."""
        grid = self.grid
        if len(self._whole_positions) != grid.slots:
            self._whole_positions = torch.zeros(grid.slots, dtype=torch.long, device=self._device)
        self.lengths, self.n_seen = lengths, grid.columns
        self.positions, self._is_whole = self._whole_positions[:n_slots], True
        self.positions.copy_(torch.tensor([*lengths, *[0] * (n_slots - len(lengths))]))

    def clear(self) -> None:
        if self.grid != self._least:
            self.reset()

    def inputs(self) -> Inputs:
        """Of the forward pass of a decode step."""
        positions = {} if self._form is MaskForm.LENGTHS else {"position_ids": self.positions[:, None]}
        return {"past_key_values": self, "attention_mask": self.masks(), **positions}

    def held(self) -> list[Tensor]:
        """All that a whole step reads and writes here. A layer that has grown has got others."""
        slots = [(layer.keys, layer.values) for layer in self._slots]
        return [self._whole_positions, *(one for pair in slots for one in pair if one is not None)]

    @property
    def _slots(self) -> list[_Slots]:
        return [layer for layer in self.layers if isinstance(layer, _Slots)]

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

    @property
    def grid(self) -> Grid | None:
        """None until the first rows have come, and in a layer that attends to the keys of another."""
        return None if self.keys is None else Grid(len(self.keys), self.keys.shape[2])

    def resize(self, grid: Grid) -> None:
        """Other tensors where the size is another, with what both have room for. Keys and values, or neither."""
        if self.keys is not None and self.values is not None and self.grid != grid:
            self.keys, self.values = _resized(self.keys, grid), _resized(self.values, grid)

    def grow(self, grid: Grid) -> None:
        if self.grid is not None:
            self.resize(self.grid.joined(grid))

    def view(self, slot: int, length: int) -> tuple[Tensor, Tensor] | None:
        if self.keys is None or self.values is None:
            return None
        return self.keys[slot, :, :length], self.values[slot, :, :length]

    def move(self, source: int, target: int) -> None:
        for held in (self.keys, self.values):
            if held is not None:
                held[target] = held[source]

    def cut(self, slot: int, length: int) -> None:
        for held in (self.keys, self.values):
            if held is not None:
                held[slot, :, length:] = 0

    def put(
        self, keys: Tensor, values: Tensor, rows: Sequence[int], lengths: Sequence[int], first: int, grid: Grid
    ) -> None:
        """Rows of keys and values go into the slots from `first` on, zeros behind each one's length.

        `grid`: what is made where nothing is there.
        """
        if self.keys is None or self.values is None:
            made = [new.new_zeros(grid.slots, new.shape[1], grid.columns, new.shape[3]) for new in (keys, values)]
            self.keys, self.values = made
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True
        for held, new in ((self.keys, keys), (self.values, values)):
            for slot, row, length in zip(held[first : first + len(rows)], rows, lengths, strict=True):
                slot[:, :length] = new[row, :, :length]
                slot[:, length:] = 0

    def _with_step(self, held: Tensor | None, new: Tensor) -> Tensor:
        assert held is not None
        rows = self._rows
        slots = held[: len(new)]
        slots[torch.arange(len(new), device=new.device), :, rows.positions] = new[:, :, 0]
        return slots[:, :, : rows.n_seen]


def _resized(held: Tensor, grid: Grid) -> Tensor:
    made = held.new_zeros(grid.slots, held.shape[1], grid.columns, held.shape[3])
    n_slots, n_columns = min(len(held), grid.slots), min(held.shape[2], grid.columns)
    made[:n_slots, :, :n_columns] = held[:n_slots, :, :n_columns]
    return made


class SoloCache:
    """One row with Hugging Face's own cache: for any model that decodes at all."""

    in_pieces = False

    def __init__(self, config: PreTrainedConfig, rotation: Rotation) -> None:
        self._config = config
        self._rotation = rotation
        self._cache: Cache | None = None
        self._is_cut = False

    def prompts(self, n_columns: int) -> Cache:
        return DynamicCache(config=self._config)

    def is_outdated(self, length: int) -> bool:
        return self._is_cut or self._rotation.outdates(length + 1)

    def grow(self, grid: Grid) -> None:
        pass  # Hugging Face's cache grows by itself

    def grow_ahead(self, grid: Grid, n_steps: int) -> None:
        pass

    def trim(self, grid: Grid) -> None:
        pass

    def put(self, prompts: Cache, rows: Sequence[int], lengths: Sequence[int], first: int) -> None:
        assert (list(rows), first) == ([0], 0), (rows, first)
        self._cache, self._is_cut = prompts, False

    def move(self, source: int, target: int) -> None:
        raise AssertionError("there is one row")

    def cut(self, slot: int, length: int) -> None:
        self._is_cut = True  # windows and states cannot go back: the text is run again

    def layers_of(self, slot: int, length: int) -> Layers | None:
        return None

    @contextmanager
    def decode(self, lengths: Sequence[int]) -> Iterator[Inputs]:
        yield {"past_key_values": self._cache}

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
