"""Prompts on their way through the model: in one pass, or a piece of positions at a time beside rows that decode.

A piece attends to the keys and values of those before it, which is what decoding does with one position. So the pieces
give what the whole gives, up to rounding, in any causal model whose cache holds every position.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.engine.cache import PromptCache
from neuronpedia_inference.engine.decoder import Decoder, ends
from neuronpedia_inference.engine.hooks import Capture, edits
from neuronpedia_inference.engine.prefixes import Known, Prefixes, text_of
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.engine.reads import Reads
from neuronpedia_inference.engine.steered import steering_edits
from neuronpedia_inference.engine.where import Passing, Span
from neuronpedia_inference.points import PATTERN, Point


@dataclass(frozen=True)
class Prompt:
    """One that runs, for all rows that begin with it."""

    rows: Sequence[RowSpec]
    """They have the same tokens, and what edits the first one's edits the others' alike."""
    known: Known | None = None
    """What need not be run."""

    @property
    def n_done(self) -> int:
        return 0 if self.known is None else self.known.n_positions


class PromptPass:
    """Prompts that will be continued; at the end, the logits of each one's last position."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], cache: Cache) -> None:
        """`cache` gets the keys and values. As many positions of every prompt are known."""
        self._decoder = decoder
        self.cache = cache
        specs = [prompt.rows[0] for prompt in prompts]
        self._lengths = [len(spec.prompt_ids) for spec in specs]
        self._ids = padded([spec.prompt_ids for spec in specs])
        self._n_done = n_done = prompts[0].n_done
        known = [prompt.known.layers for prompt in prompts if prompt.known is not None]
        if known:
            assert isinstance(cache, PromptCache)
            cache.begin_with(known, n_done)
        self.n_tokens = len(specs) * (self.width - n_done)
        """To run, padding included."""
        self.n_padding = self.n_tokens + len(specs) * n_done - sum(self._lengths)
        self.places = [place for place, prompt in enumerate(prompts) for _ in prompt.rows]
        """Of every row, its prompt's."""
        self._passing = Passing()
        self._reads = Reads([row for prompt in prompts for row in prompt.rows], self.places)
        told = [known for prompt in prompts for known in _numbers_of(prompt)]
        self._numbers: list[list[Numbers]] = [[] if known is None else [known] for known in told]
        self._changes = steering_edits(specs, self._passing, self._reads)
        self._logits: list[Tensor | None] = [None] * len(specs)

    @property
    def n_prompts(self) -> int:
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
        lengths = [self._lengths[place] for place in self.places]
        self._reads.begin([max(0, min(length, behind) - first) for length in lengths], first)
        logits = self._decoder.forward(ids, inputs, self._changes, wanted)
        for (row, _), of_row in zip(wanted, logits, strict=True):
            self._logits[row] = of_row
        for row, numbers in enumerate(self._reads.take()):
            self._numbers[row] += [] if numbers is None else [numbers]
        self._n_done = behind
        return behind - first

    def logits(self) -> list[Tensor]:
        """[vocab] of every row, float32."""
        found = [self._logits[place] for place in self.places]
        return [logits for logits in found if logits is not None]

    def numbers(self) -> list[Numbers | None]:
        """Of every row, [pos, n] as in `RowStep.numbers`; None of those that nobody watches."""
        return [np.concatenate(kept) if kept else None for kept in self._numbers]


def _numbers_of(prompt: Prompt) -> Sequence[Numbers | None]:
    """Of every row what is known of it."""
    return [None] * len(prompt.rows) if prompt.known is None else prompt.known.numbers


def passes_of(rows: Sequence[RowSpec], prefixes: Prefixes | None) -> list[list[tuple[Prompt, list[int]]]]:
    """How the prompts of these rows run: equal ones once, and those of which as much is known in one pass; with the
    rows of each.

    prefixes: what is known; None where every row runs by itself.
    """
    alike: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(place if prefixes is None else _beginning(place, row), []).append(place)
    by_length: dict[int, list[tuple[Prompt, list[int]]]] = {}
    for places in alike.values():
        of_prompt = [rows[place] for place in places]
        prompt = Prompt(of_prompt, None if prefixes is None else prefixes.find(of_prompt))
        by_length.setdefault(prompt.n_done, []).append((prompt, places))
    return list(by_length.values())


def _beginning(place: int, row: RowSpec) -> Hashable:
    """Rows that have the same run their prompts once. What conditions see is each row's own, and what edits tell is
    told of these very edits."""
    if row.triggers:
        return place
    is_told = row.tells_edits and row.acts_from < row.n_prompt
    return text_of(row), tuple(map(id, row.edits)) if is_told else ()


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
