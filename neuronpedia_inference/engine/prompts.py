"""Prompts on their way through the model: in one pass, or a piece of positions at a time beside rows that decode.

A piece attends to the keys and values of those before it, which is what decoding does with one position. So the pieces
give what the whole gives, up to rounding, in any causal model whose cache holds every position.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.engine.cache import PromptCache
from neuronpedia_inference.engine.decoder import Decoder, ends
from neuronpedia_inference.engine.hooks import Capture, edits
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.engine.reads import Reads
from neuronpedia_inference.engine.steered import steering_edits
from neuronpedia_inference.engine.where import Passing, Span
from neuronpedia_inference.points import PATTERN, Point


class PromptPass:
    """Prompts that will be continued; at the end, the logits of each one's last position."""

    def __init__(self, decoder: Decoder, specs: Sequence[RowSpec], cache: Cache, n_done: int = 0) -> None:
        """`cache` gets the keys and values, and has those of the first `n_done` positions already."""
        self._decoder = decoder
        self.cache = cache
        self._lengths = [len(spec.prompt_ids) for spec in specs]
        self._ids = padded([spec.prompt_ids for spec in specs])
        self._n_done = n_done
        self.n_tokens = len(specs) * (self.width - n_done)
        """To run, padding included."""
        self.n_padding = self.n_tokens + len(specs) * n_done - sum(self._lengths)
        self._passing = Passing()
        self._reads = Reads(specs)
        self._numbers: list[list[Numbers]] = [[] for _ in specs]
        self._changes = steering_edits(specs, self._passing, self._reads)
        self._logits: list[Tensor | None] = [None] * len(specs)

    @property
    def n_rows(self) -> int:
        return len(self._lengths)

    @property
    def width(self) -> int:
        """Positions of the longest prompt."""
        return max(self._lengths)

    @property
    def n_left(self) -> int:
        """Positions to run of every prompt."""
        return self.width - self._n_done

    @property
    def is_done(self) -> bool:
        return self.n_left == 0

    def advance(self, n_positions: int) -> int:
        """Run the next positions of every prompt; how many. After an exception the pass is of no more use."""
        first, behind = self._n_done, min(self._n_done + n_positions, self.width)
        ids = self._ids[:, first:behind]
        self._passing.span = Span([first] * len(self._lengths), ids)
        wanted = [(row, at - first) for row, at in ends(self._lengths) if first <= at < behind]
        inputs = {"past_key_values": self.cache}
        self._reads.begin([max(0, min(length, behind) - first) for length in self._lengths], first)
        logits = self._decoder.forward(ids, inputs, self._changes, wanted)
        for (row, _), of_row in zip(wanted, logits, strict=True):
            self._logits[row] = of_row
        for row, numbers in enumerate(self._reads.take()):
            self._numbers[row] += [] if numbers is None else [numbers]
        self._n_done = behind
        return behind - first

    def logits(self) -> list[Tensor]:
        """[vocab] of every prompt, float32."""
        return [logits for logits in self._logits if logits is not None]

    def numbers(self) -> list[Numbers | None]:
        """Of every prompt, [pos, n] as in `RowStep.numbers`; None of those that nobody watches."""
        return [np.concatenate(kept) if kept else None for kept in self._numbers]


class CapturePass:
    """Prompts that are only read, behind what edits them. The pass ends at the last point wanted."""

    def __init__(self, decoder: Decoder, rows: Sequence[RowSpec], points: Collection[Point]) -> None:
        self._decoder = decoder
        self._points = frozenset(points)
        self._ids = padded([row.prompt_ids for row in rows])
        self._passing = Passing()
        self._changes = steering_edits(rows, self._passing)
        self._cache: PromptCache | None = None
        self._n_done = 0
        self.seen: dict[Point, Tensor] = {}
        """[prompt, pos, ...], patterns [prompt, head, pos, pos]; once it is done."""

    @property
    def width(self) -> int:
        """Positions of the longest prompt."""
        return self._ids.shape[1]

    @property
    def n_tokens(self) -> int:
        """Of all prompts, padding included."""
        return self._ids.numel()

    @property
    def is_done(self) -> bool:
        return self._n_done == self.width

    def advance(self, n_positions: int) -> int:
        """Run the next positions of every prompt; how many. After an exception the pass is of no more use."""
        if not self._n_done and n_positions >= self.width:
            self.seen = self._run(slice(0, self.width), {"use_cache": False})
            self._n_done = self.width
            return self.width
        if self._cache is None:
            self._cache = PromptCache(self._decoder.model.config, self.width)
        piece = slice(self._n_done, min(self._n_done + n_positions, self.width))
        found = self._run(piece, {"past_key_values": self._cache, "use_cache": True})
        for point, tensor in found.items():
            self._keep(point, tensor, piece)
        self._n_done = piece.stop
        if self.is_done:
            self._cache = None
        return piece.stop - piece.start

    def _run(self, piece: slice, inputs: dict[str, Any]) -> dict[Point, Tensor]:
        ids = self._ids[:, piece]
        self._passing.span = Span([piece.start] * len(ids), ids)
        capture = Capture(self._points)
        with edits(self._decoder.tree, self._changes), capture.on(self._decoder.tree):
            self._decoder.tree.run(ids, **inputs)
        return capture.seen

    def _keep(self, point: Point, tensor: Tensor, piece: slice) -> None:
        if point.place == PATTERN:
            if point not in self.seen:
                self.seen[point] = tensor.new_zeros(*tensor.shape[:2], self.width, self.width)
            self.seen[point][:, :, piece, : piece.stop] = tensor
            return
        if point not in self.seen:
            self.seen[point] = tensor.new_empty(len(tensor), self.width, *tensor.shape[2:])
        self.seen[point][:, piece] = tensor


def padded(prompts: Sequence[Sequence[int]]) -> Tensor:
    """[prompt, pos] ids, zeros on the right."""
    width = max(map(len, prompts))
    return torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], dtype=torch.long)
