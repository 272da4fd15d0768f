"""A decode step of fixed shape: the same operations on the same tensors, whoever decodes and whatever is steered where.

Its inputs are written into tensors that stay where they are: ids, positions, and a table that holds what is added to
every row before every block and after the last. All slots run, at the full width of the cache; slots without a row
compute what nobody reads. So the step can be recorded once as a CUDA graph and replayed, with nothing declared in
advance. Additive steering of the residual stream fits the tables; other rows decode step by step (`generation.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuronpedia_inference.engine.cache import RowCache
from neuronpedia_inference.engine.hooks import Edit, edits
from neuronpedia_inference.engine.points import RESID_POST, RESID_PRE, Point
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.steering.plan import SteerMethod

if TYPE_CHECKING:
    from neuronpedia_inference.engine.decoder import Decoder

log = logging.getLogger(__name__)

RECORDED = frozenset({RESID_PRE, RESID_POST})
"""Places whose additive steering fits the table."""

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]


class StaticStep:
    """The step of one lane, for the slots and columns that its cache has now."""

    def __init__(self, decoder: Decoder, cache: RowCache, record: Record) -> None:
        """`record` makes of the step one that does the same faster; it may run it first."""
        text = decoder.model.config.get_text_config()
        n_layers, width = text.num_hidden_layers, text.hidden_size
        self._decoder = decoder
        self.cache = cache
        self._held = cache.held()
        n_slots, device, dtype = cache.shape[0], decoder.model.device, decoder.model.dtype
        self._ids = torch.zeros(n_slots, 1, dtype=torch.long, device=device)
        self._added = torch.zeros(n_layers + 1, n_slots, 1, width, dtype=dtype, device=device)
        """[layer, slot, 1, d_model]: what is added before each block, and after the last."""
        points = [Point(layer, RESID_PRE) for layer in range(n_layers)]
        adders = [self._adder(place) for place in range(n_layers + 1)]
        self._changes = list(zip([*points, Point(n_layers - 1, RESID_POST)], adders, strict=True))
        self._step = record(self._forward)

    @property
    def is_current(self) -> bool:
        """Whether the cache still holds what it held. A layer may grow alone, where the next one's growth failed."""
        now = self.cache.held()
        return len(now) == len(self._held) and all(a is b for a, b in zip(now, self._held, strict=True))

    @staticmethod
    def fits(rows: Sequence[RowSpec]) -> bool:
        """Whether tables can hold all that these rows are steered with."""
        steers = (steering for row in rows for steering in row.steering)
        return all(s.point.place in RECORDED and s.method is SteerMethod.SIMPLE_ADDITIVE for s in steers)

    def steer(self, rows: Sequence[RowSpec]) -> None:
        """The rows as they are now, in the order of their slots."""
        self._added.zero_()
        for slot, row in enumerate(rows):
            for s in row.steering if self.fits([row]) else ():
                place = s.point.layer + (s.point.place == RESID_POST)
                self._added[place, slot, 0] += (s.coefficient * s.vector).to(self._added.dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        """[row, 1] ids -> [row, vocab] logits, float32, which the next step does not overwrite."""
        self._ids[: len(ids)] = ids.to(self._ids.device)
        return self._step()[: len(ids)].to(torch.float32, copy=True)

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


def as_it_is(step: Step) -> Step:
    """Recorded as nothing: it runs operation by operation."""
    return step


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
