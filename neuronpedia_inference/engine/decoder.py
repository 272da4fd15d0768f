"""One forward pass of the model, with the logits that are wanted and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from neuronpedia_inference.engine.cache import Inputs
from neuronpedia_inference.engine.hooks import Edit, StopForwardError, edits
from neuronpedia_inference.engine.tree import Tree
from neuronpedia_inference.points import Point

Changes = Sequence[tuple[Point, Edit]]
Places = Sequence[tuple[int, int]]
"""(row, position) pairs."""


@dataclass(frozen=True)
class Decoder:
    """A model that decodes."""

    tree: Tree
    stop_ids: frozenset[int]

    @property
    def model(self) -> PreTrainedModel:
        return self.tree.model

    def forward(self, ids: Tensor, inputs: Inputs, changes: Changes, wanted: Places) -> Tensor:
        """[row, pos] ids -> [place, vocab] logits at the places wanted, float32. Without any, no logits are made."""
        logits = torch.empty(0)
        with edits(self.tree, changes), _head_at(self.model, ids, wanted) as places, suppress(StopForwardError):
            output = self.tree.run(ids, use_cache=True, **inputs, **places)
            logits = output.logits[:, -1].float()
        return logits


def ends(lengths: Sequence[int]) -> Places:
    """The last place of every row."""
    return [(row, length - 1) for row, length in enumerate(lengths)]


@contextmanager
def _head_at(model: PreTrainedModel, ids: Tensor, wanted: Places) -> Iterator[dict[str, Any]]:
    """Lets the unembedding run at these places alone; gives the arguments that the forward needs."""
    if list(wanted) == ends([ids.shape[1]] * len(ids)):
        yield {"logits_to_keep": 1}
        return
    head: Any = model.get_output_embeddings()
    with ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(_cut_to(wanted)).remove)
        yield {}


def _cut_to(wanted: Places) -> Callable[..., Any]:
    if not wanted:
        return _stop
    rows, positions = (torch.tensor(part) for part in zip(*wanted, strict=True))

    def cut(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, positions][:, None], *args[1:])

    return cut


def _stop(*_: Any) -> None:
    raise StopForwardError
