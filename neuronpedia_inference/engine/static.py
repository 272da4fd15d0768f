"""A decode step of fixed shape: the same operations on the same tensors, whoever decodes and whatever is steered where.

Its inputs are written into tensors that stay where they are: ids, positions, and a table that holds what is added to
every row before every block and after the last. As many slots run as the rows' bucket has, at the full width of the
cache; slots without a row compute what nobody reads. So the step can be recorded once per bucket as a CUDA graph and
replayed, with nothing declared in advance. Additions to the residual stream, the same at every generated position,
fit the tables; other rows decode step by step (`generation.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuronpedia_inference.costs import RECORDED_GRID, Grid
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.engine.cache import RowCache
from neuronpedia_inference.engine.hooks import Edit, edits
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.engine.where import made_of
from neuronpedia_inference.points import RESID_POST, RESID_PRE, Point

if TYPE_CHECKING:
    from neuronpedia_inference.engine.decoder import Decoder

log = logging.getLogger(__name__)

RECORDED = frozenset({RESID_PRE, RESID_POST})
"""Places at which additions fit the table."""

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]


class Recordings:
    """The recorded steps of one lane, one for each number of slots, as long as its cache holds the same tensors."""

    def __init__(self, decoder: Decoder, cache: RowCache, record: Record) -> None:
        """`record` makes of a step one that does the same faster; it may run it first."""
        self._decoder = decoder
        self._cache = cache
        self._record = record
        self._steps: dict[int, StaticStep] = {}
        self._held: list[Tensor] = []

    @staticmethod
    def n_slots(n_rows: int) -> int:
        """Slots that run for so many rows: 1, 2, 4, 8, 16, and beyond that in the steps in which slots are made."""
        return min(1 << max(0, n_rows - 1).bit_length(), max(RECORDED_GRID.slots, Grid.of(n_rows, 0).slots))

    def logits(self, ids: Tensor, lengths: Sequence[int], rows: Sequence[RowSpec]) -> Tensor:
        """[row, 1] ids -> [row, vocab] logits, float32. `rows`: the same object as long as they are the same rows."""
        n_slots = self.n_slots(len(rows))
        self._cache.begin_whole(lengths, n_slots)
        held = self._cache.held()
        if len(held) != len(self._held) or any(a is not b for a, b in zip(held, self._held, strict=True)):
            self._steps.clear()  # first, so that their memory is there for others
            self._held = held
        if n_slots not in self._steps:
            self._steps[n_slots] = StaticStep(self._decoder, self._cache, self._record, n_slots)
        return self._steps[n_slots].logits(ids, rows)


class StaticStep:
    """The step of one lane, for so many slots of the tensors that its cache holds now."""

    def __init__(self, decoder: Decoder, cache: RowCache, record: Record, n_slots: int) -> None:
        """`cache` is about to run such a step."""
        text = decoder.model.config.get_text_config()
        n_layers, width = text.num_hidden_layers, text.hidden_size
        self._decoder = decoder
        self.cache = cache
        self._rows: Sequence[RowSpec] | None = None
        """Whose steering the table holds."""
        device, dtype = decoder.model.device, decoder.model.dtype
        self._ids = torch.zeros(n_slots, 1, dtype=torch.long, device=device)
        self._added = torch.zeros(n_layers + 1, n_slots, 1, width, dtype=dtype, device=device)
        """[layer, slot, 1, d_model]: what is added before each block, and after the last."""
        points = [Point(layer, RESID_PRE) for layer in range(n_layers)]
        adders = [self._adder(place) for place in range(n_layers + 1)]
        self._changes = list(zip([*points, Point(n_layers - 1, RESID_POST)], adders, strict=True))
        self._step = record(self._forward)

    @staticmethod
    def fits(rows: Sequence[RowSpec]) -> bool:
        """Whether tables can hold all that these rows are steered with."""
        return all(_fits(edit) for row in rows for edit in row.edits)

    def logits(self, ids: Tensor, rows: Sequence[RowSpec]) -> Tensor:
        """As `Recordings.logits`; the next step does not overwrite them."""
        if self._rows is not rows:
            self._rows = None
            self._steer(rows)
            self._rows = rows
        self._ids[: len(ids)] = ids.to(self._ids.device)
        return self._step()[: len(ids)].to(torch.float32, copy=True)

    def _steer(self, rows: Sequence[RowSpec]) -> None:
        self._added.zero_()
        for slot, row in enumerate(rows):
            for point, table in made_of(row).tables.items():
                place = point.layer + (point.place == RESID_POST)
                self._added[place, slot, 0] += table.added_when_generated.to(self._added.dtype)

    def _forward(self) -> Tensor:
        """[slot, vocab]; reads nothing but tensors that stay where they are."""
        with edits(self._decoder.tree, self._changes):
            output = self._decoder.tree.run(
                self._ids,
                position_ids=self.cache.positions[:, None],
                attention_mask=self.cache.masks(),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]

    def _adder(self, place: int) -> Edit:
        return lambda hidden: hidden + self._added[place]


def _fits(edit: RowEdit) -> bool:
    is_even = edit.on.weight_when_generated is not None and edit.when is None
    is_one_vector = edit.do is Do.ADD and not edit.is_dose and not edit.is_limited
    return edit.point.place in RECORDED and is_one_vector and is_even


def as_cuda_graph(step: Step) -> Step:
    """The step recorded on the current CUDA device. Raises RuntimeError where it cannot be."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()  # what is made lazily must not be made while recording
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
