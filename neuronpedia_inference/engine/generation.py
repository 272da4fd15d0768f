"""Rows that decode together: their cache, their steering, their sampling. They join and leave between steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from neuronpedia_inference.engine.cache import Inputs, RowCache, RowMemory, SoloCache
from neuronpedia_inference.engine.hooks import Edit, Site, edits
from neuronpedia_inference.engine.points import ATTN_OUT, RESID_MID, RESID_PRE, WRITABLE, Point
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep, Steering
from neuronpedia_inference.engine.sampling import Sampler
from neuronpedia_inference.engine.static import Record, StaticStep
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.steering.apply import SteerTable

Changes = Sequence[tuple[Point, Edit]]


@dataclass(frozen=True)
class Decoder:
    """A module tree that decodes: the plain model, or the bridge's twin."""

    model: PreTrainedModel
    site: Site
    stop_ids: frozenset[int]
    vocab_size: int

    def forward(self, ids: Tensor, inputs: Inputs, changes: Changes, lengths: Sequence[int]) -> Tensor:
        """[row, pos] ids -> [row, vocab] logits of each row's last position, float32.

        `lengths`: positions of each row in `ids`, padding on the right.
        """
        with edits(self.site, changes), _last_of(self.model, ids, lengths) as places:
            output = self.model(input_ids=ids.to(self.model.device), use_cache=True, **inputs, **places)
        return output.logits[:, -1].float()


@dataclass
class _Row:
    id: RowId
    spec: RowSpec
    sampler: Sampler
    n_generated: int = 0
    next_id: int = -1


@dataclass
class Lane:
    """One batch. A row's tokens are the same whoever else is in it: nothing is shared but the forward pass."""

    decoder: Decoder
    memory: RowMemory
    record: Record | None = None
    """Makes steps of fixed shape fast, where the rows allow them."""
    _rows: list[_Row] = field(default_factory=list, init=False)
    _changes: Changes = field(default=(), init=False)
    """Steering of the rows as they are now."""
    _static: StaticStep | None = field(default=None, init=False)

    @classmethod
    def merging(cls, decoder: Decoder, record: Record | None = None) -> Lane:
        """For many rows."""
        model = decoder.model
        cache = RowCache(model.config, dtype=model.dtype, device=model.device, stays=record is not None)
        return cls(decoder, cache, record)

    @property
    def rows(self) -> list[RowId]:
        return [row.id for row in self._rows]

    def prefill(self, rows: Sequence[tuple[RowId, RowSpec]]) -> list[RowStep]:
        """Rows join; the first token of each. After an exception none has joined."""
        new = [_Row(id_, spec, Sampler(spec.sampling, spec.prompt_ids, self.decoder.vocab_size)) for id_, spec in rows]
        specs = [row.spec for row in new]
        lengths = [len(spec.prompt_ids) for spec in specs]
        longest = max(len(spec.prompt_ids) + spec.sampling.max_new_tokens for spec in specs)
        changes = steering_edits(specs, untouched=_untouched(specs, max(lengths), self.decoder.model.device))
        with self.memory.prefill(lengths, longest) as inputs:
            logits = self.decoder.forward(_padded(specs, max(lengths)), inputs, changes, lengths)
        self._rows += new
        self._steer_anew()
        return self._draw(new, logits)

    def decode(self) -> list[RowStep]:
        """One more token for every row."""
        return self._draw(self._rows, self.logits(torch.tensor([[row.next_id] for row in self._rows])))

    def logits(self, ids: Tensor) -> Tensor:
        """One position more for every row: [row, 1] ids -> [row, vocab], float32."""
        if self.record is not None and StaticStep.fits([row.spec for row in self._rows]):
            return self._decode_whole(ids, self.record)
        with self.memory.decode() as inputs:
            return self.decoder.forward(ids, inputs, self._changes, [1] * len(self._rows))

    def _decode_whole(self, ids: Tensor, record: Record) -> Tensor:
        """[row, 1] ids -> [row, vocab]; the step is recorded when the cache has got another shape."""
        assert isinstance(self.memory, RowCache)
        with self.memory.decode_whole():
            if self._static is None or self._static.shape != self.memory.shape:
                self._static = StaticStep(self.decoder, self.memory, record)
                self._static.steer([row.spec for row in self._rows])
            return self._static(ids)

    def drop(self, rows: Collection[RowId]) -> None:
        """Rows leave; ids of rows that are not here are ignored."""
        for place in reversed(range(len(self._rows))):
            if self._rows[place].id in rows:
                self.memory.drop(place)
                self._rows[place] = self._rows[-1]
                self._rows.pop()
        self._steer_anew()

    def _steer_anew(self) -> None:
        """Only when rows have joined or left."""
        specs = [row.spec for row in self._rows]
        self._changes = steering_edits(specs)
        if self._static is not None and self._static.shape == self._static.cache.shape:
            self._static.steer(specs)
        else:
            self._static = None

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> list[RowStep]:
        steps = [self._step(row, logits[place]) for place, row in enumerate(rows)]
        finished = {step.row for step in steps if step.ends}
        if finished:
            self.drop(finished)
        return steps

    def _step(self, row: _Row, logits: Tensor) -> RowStep:
        try:
            token = row.sampler.draw(logits)
        except InvalidRequest as exc:
            return RowStep(row.id, -1, error=exc)
        logprob, top = row.sampler.logprobs(logits, token)
        row.next_id = token
        row.n_generated += 1
        finish = None
        if token in self.decoder.stop_ids:
            finish = "stop"
        elif row.n_generated >= row.spec.sampling.max_new_tokens:
            finish = "length"
        return RowStep(row.id, token, logprob, top, finish)


class SoloLane:
    """Rows that run one at a time, each with the cache that Hugging Face gives its model."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lanes: dict[RowId, Lane] = {}

    @property
    def rows(self) -> list[RowId]:
        return list(self._lanes)

    def prefill(self, rows: Sequence[tuple[RowId, RowSpec]]) -> list[RowStep]:
        lanes = {row[0]: Lane(self._decoder, SoloCache(self._decoder.model.config)) for row in rows}
        steps = [step for row in rows for step in lanes[row[0]].prefill([row])]
        self._lanes |= lanes
        return self._without_finished(steps)

    def decode(self) -> list[RowStep]:
        return self._without_finished([step for lane in self._lanes.values() for step in lane.decode()])

    def drop(self, rows: Collection[RowId]) -> None:
        self._lanes = {id_: lane for id_, lane in self._lanes.items() if id_ not in rows}

    def _without_finished(self, steps: list[RowStep]) -> list[RowStep]:
        self.drop({step.row for step in steps if step.ends})
        return steps


def steering_edits(rows: Sequence[RowSpec], untouched: Tensor | None = None) -> Changes:
    """What to install for these rows, in the order in which a block reaches it.

    untouched: [row, pos] of bool, positions that steering leaves alone. resid_mid is no tensor of its own in most
    models: it is the sum of resid_pre and attn_out, read by the MLP branch and carried on by the skip connection. What
    steering adds to it is added to attn_out, so both see it.
    """
    by_point: dict[Point, list[list[Steering]]] = defaultdict(lambda: [[] for _ in rows])
    for row, spec in enumerate(rows):
        for steering in spec.steering:
            by_point[steering.point][row].append(steering)
    changes: list[tuple[Point, Edit]] = []
    for point in sorted(by_point, key=lambda p: (p.layer, WRITABLE.index(p.place))):
        change = _change(SteerTable(by_point[point]), untouched)
        if point.place == RESID_MID:
            changes += _edit_sum(point.layer, change)
        else:
            changes.append((point, change))
    return changes


def _change(table: SteerTable, untouched: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda hidden: table(hidden, untouched)


def _edit_sum(layer: int, change: Callable[[Tensor], Tensor]) -> list[tuple[Point, Edit]]:
    resid_pre: list[Tensor] = []

    def remember(tensor: Tensor) -> None:
        resid_pre[:] = [tensor]

    def edit(attn_out: Tensor) -> Tensor:
        mid = resid_pre[0] + attn_out
        return attn_out + (change(mid) - mid)

    return [(Point(layer, RESID_PRE), remember), (Point(layer, ATTN_OUT), edit)]


def _untouched(rows: Sequence[RowSpec], width: int, device: torch.device) -> Tensor | None:
    """[row, pos] of the prompts' positions that steering leaves alone; None where there are none."""
    if not any(spec.untouched for spec in rows):
        return None
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, spec in enumerate(rows):
        mask[row, list(spec.untouched)] = True
    return mask.to(device)


def _padded(rows: Sequence[RowSpec], width: int) -> Tensor:
    """[row, pos] ids, zeros on the right."""
    return torch.tensor([[*spec.prompt_ids, *[0] * (width - len(spec.prompt_ids))] for spec in rows])


@contextmanager
def _last_of(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Lets the unembedding run on each row's last position alone; gives the arguments that the forward needs."""
    if min(lengths) == ids.shape[1]:
        yield {"logits_to_keep": 1}
        return
    head: Any = model.get_output_embeddings()
    rows, last = torch.arange(len(lengths)), torch.tensor(lengths) - 1

    def cut(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, last][:, None], *args[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        yield {}
    finally:
        handle.remove()
