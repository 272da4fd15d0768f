"""Checks at start that two ways to the same numbers agree on the model at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.engine.cache import RowCache, RowMemory, SoloCache
from neuronpedia_inference.engine.decoder import Decoder, ends
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.points import RESID_POST, Point
from neuronpedia_inference.engine.prompts import padded
from neuronpedia_inference.engine.protocol import RowId, RowSpec, Steering
from neuronpedia_inference.engine.static import Record
from neuronpedia_inference.steering.plan import SteerMethod

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_DEEP_TOLERANCE = {torch.float32: 1e-3}
_N_STEPS = 2


def nearly_equal(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether every vector (last axis) of one is the other's, up to the rounding of a few layers in `dtype`."""
    return _relative_error(one, other) < _TOLERANCE.get(dtype, 5e-2)


def merging_agrees(decoder: Decoder, ids: Sequence[int]) -> bool:
    """Whether rows of different length give the same logits in one batch as each alone with Hugging Face's own cache.

    `ids`: at least 4 tokens. Rounding in 16 bits grows through all layers, so there only gross differences count.
    """
    model = decoder.model
    rows = [list(ids), list(ids[1:3])]
    merged = RowCache(model.config, dtype=model.dtype, device=model.device)
    together = list(_logits(decoder, merged, rows))
    alone = [list(_logits(decoder, SoloCache(model.config), [row])) for row in rows]
    tolerance = _DEEP_TOLERANCE.get(model.dtype, 0.2)
    steps = zip(together, *alone, strict=True)
    return all(_relative_error(both, torch.cat(single)) < tolerance for both, *single in steps)


def recording_agrees(decoder: Decoder, record: Record, ids: Sequence[int]) -> bool:
    """Whether recorded steps give the logits of steps that are not, for two rows, one of them steered.

    Raises RuntimeError where steps cannot be recorded.
    """
    vector = torch.ones(decoder.model.config.get_text_config().hidden_size, device=decoder.model.device)
    steering = Steering(Point(0, RESID_POST), vector, 1.0, SteerMethod.SIMPLE_ADDITIVE)
    rows = [RowSpec(tuple(ids), Sampling(8), (steering,)), RowSpec(tuple(ids[1:3]), Sampling(8))]
    tolerance = _DEEP_TOLERANCE.get(decoder.model.dtype, 0.2)
    found = []
    for lane in (Lane.merging(decoder), Lane.merging(decoder, record)):
        lane.prefill([(RowId(0, place), row) for place, row in enumerate(rows)])
        found.append([lane.logits(torch.full((2, 1), step + 1)) for step in range(_N_STEPS)])
    return all(_relative_error(one, other) < tolerance for one, other in zip(*found, strict=True))


def _logits(decoder: Decoder, memory: RowMemory, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """[row, vocab] after the prompts and after each of a few further tokens, the same for every row."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    prompts = memory.prompts(width)
    yield decoder.forward(padded(rows), {"past_key_values": prompts}, (), ends(lengths))
    memory.join(prompts, range(len(rows)), lengths, width + _N_STEPS)
    for step in range(_N_STEPS):
        fed = torch.full((len(rows), 1), step + 1)
        with memory.decode() as inputs:
            yield decoder.forward(fed, inputs, (), ends([1] * len(rows)))


def _relative_error(one: Tensor, other: Tensor) -> float:
    one, other = one.float(), other.float()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-6)).max())
