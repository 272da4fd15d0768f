"""A running batch: key-value cache, steering and sampling of its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from neuronpedia_inference.engine.hooks import Edit, Site, edits
from neuronpedia_inference.engine.points import ATTN_OUT, RESID_MID, RESID_PRE, WRITABLE, Point
from neuronpedia_inference.engine.protocol import RowSpec, RowStep, Steering
from neuronpedia_inference.engine.sampling import Sampler
from neuronpedia_inference.steering.apply import steer


@dataclass
class _Row:
    index: int
    spec: RowSpec
    sampler: Sampler
    n_generated: int = 0
    next_id: int = -1


class BatchGeneration:
    """Rows with prompts of one length that decode together; each leaves as it finishes.

    The answer to `step` is the same for a row whoever else is in the batch: nothing is shared but the forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        site: Site,
        rows: Sequence[RowSpec],
        *,
        stop_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        lengths = {len(row.prompt_ids) for row in rows}
        assert len(lengths) == 1, lengths
        self._model = model
        self._site = site
        self._stop_ids = stop_ids
        self._rows = [
            _Row(index, spec, Sampler(spec.sampling, spec.prompt_ids, vocab_size)) for index, spec in enumerate(rows)
        ]
        self._cache = DynamicCache(config=model.config)
        self._logits: Tensor | None = self._forward(torch.tensor([row.prompt_ids for row in rows]), prefill=True)

    @property
    def done(self) -> bool:
        return not self._rows

    def step(self) -> list[RowStep]:
        """One token for every live row."""
        logits = self._logits if self._logits is not None else self._forward(self._next_ids(), prefill=False)
        self._logits = None
        steps = [self._draw(row, logits[place]) for place, row in enumerate(self._rows)]
        self._drop_finished(steps)
        return steps

    def _draw(self, row: _Row, logits: Tensor) -> RowStep:
        token = row.sampler.draw(logits)
        logprob, top = row.sampler.logprobs(logits, token)
        row.next_id = token
        row.n_generated += 1
        finish = None
        if token in self._stop_ids:
            finish = "stop"
        elif row.n_generated >= row.spec.sampling.max_new_tokens:
            finish = "length"
        return RowStep(row.index, token, logprob, top, finish)

    def _drop_finished(self, steps: Sequence[RowStep]) -> None:
        keep = [place for place, step in enumerate(steps) if step.finish_reason is None]
        if len(keep) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in keep]
        if keep:
            self._cache.batch_select_indices(torch.tensor(keep, device=self._model.device))

    def _next_ids(self) -> Tensor:
        return torch.tensor([[row.next_id] for row in self._rows])

    def _forward(self, ids: Tensor, *, prefill: bool) -> Tensor:
        """[row, pos] ids -> [row, vocab] logits of the last position, float32."""
        changes = steering_edits([row.spec for row in self._rows], prefill=prefill)
        with edits(self._site, changes):
            output = self._model(
                input_ids=ids.to(self._model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()


def steering_edits(rows: Sequence[RowSpec], *, prefill: bool) -> list[tuple[Point, Edit]]:
    """What to install for these rows, in the order in which a block reaches it.

    resid_mid is no tensor of its own in most models: it is the sum of resid_pre and attn_out, read by the MLP branch
    and carried on by the skip connection. What steering adds to it is added to attn_out, so both see it.
    """
    by_point: dict[Point, list[tuple[int, Steering]]] = defaultdict(list)
    for row, spec in enumerate(rows):
        for steering in spec.steering:
            by_point[steering.point].append((row, steering))
    untouched = [spec.untouched if prefill else () for spec in rows]
    changes: list[tuple[Point, Edit]] = []
    for point in sorted(by_point, key=lambda p: (p.layer, WRITABLE.index(p.place))):
        change = _change(by_point[point], untouched)
        if point.place == RESID_MID:
            changes += _edit_sum(point.layer, change)
        else:
            changes.append((point, change))
    return changes


def _change(steers: Sequence[tuple[int, Steering]], untouched: Sequence[tuple[int, ...]]) -> Callable[[Tensor], Tensor]:
    """[row, pos, ...width] -> the same with the steers applied, in request order, to their own rows only."""

    def change(hidden: Tensor) -> Tensor:
        changed = hidden.flatten(2).clone()
        original = hidden.flatten(2)
        for row, s in steers:
            changed[row] = steer(changed[row], s.vector, s.coefficient, s.method)
        for row in {row for row, _ in steers}:
            positions = list(untouched[row])
            changed[row, positions] = original[row, positions]
        return changed.view(hidden.shape)

    return change


def _edit_sum(layer: int, change: Callable[[Tensor], Tensor]) -> list[tuple[Point, Edit]]:
    resid_pre: list[Tensor] = []

    def remember(tensor: Tensor) -> None:
        resid_pre[:] = [tensor]

    def edit(attn_out: Tensor) -> Tensor:
        mid = resid_pre[0] + attn_out
        return attn_out + (change(mid) - mid)

    return [(Point(layer, RESID_PRE), remember), (Point(layer, ATTN_OUT), edit)]
