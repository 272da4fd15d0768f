"""The engine: one Hugging Face model, read and steered at its own modules, with what a probe has found it to give."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from neuronpedia_inference.domain import TokenEffects
from neuronpedia_inference.engine.cache import MaskForm, windows
from neuronpedia_inference.engine.decoder import Decoder
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.linear import torch_products
from neuronpedia_inference.engine.places import adopt
from neuronpedia_inference.engine.probe import probe
from neuronpedia_inference.engine.prompts import CapturePass
from neuronpedia_inference.engine.protocol import Captured, ModelInfo, Reading, RowSpec, Watch, only_read
from neuronpedia_inference.engine.readout import Readout, token_effects
from neuronpedia_inference.engine.solo import FIXED_POSITIONS, SoloLane
from neuronpedia_inference.engine.static import as_cuda_graph
from neuronpedia_inference.engine.tree import Tree, rms_normalized
from neuronpedia_inference.engine.verdict import Finding, Verdict, VerdictFile
from neuronpedia_inference.errors import InvalidRequest, UnknownPoint
from neuronpedia_inference.points import MLP_POST, NORMALIZED, PATTERN, READABLE, WRITABLE, Point
from neuronpedia_inference.recent import Recent


class ModelEngine:
    """One model on one device. Not thread-safe: the worker owns it."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        model_id: str,
        name: str,
        stop_ids: Iterable[int],
        max_positions: int | None = None,
        graphs: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        """max_positions: of the longest text that will be served. `graphs`: replay decode steps as CUDA graphs if the
        device can. cache_dir: where descriptions and verdicts are kept from start to start; None: the model is probed.

        Raises StartupError for an architecture that TransformerLens does not know.
        """
        self._model = model
        self._tree = Tree(model, cache_dir)
        self._names = {"id": model_id, "name": name, "family": self._tree.architecture}
        self.decoder = Decoder(self._tree, frozenset(stop_ids))
        self.verdict = self._judged(max_positions, graphs, cache_dir)
        self.recent: Recent = Recent(0, n_bytes)
        """What is kept of prompts: points [pos, width], and keys and values of rows."""
        record = None if self.verdict.unrecorded_because else as_cuda_graph
        self.reproducible_lane = SoloLane(self._lane_of_one, torch_products, takes_turns=True)
        self.lane: Lane | SoloLane = (
            SoloLane(self._lane_of_one)
            if self.unmerged_because
            else Lane.merging(self.decoder, MaskForm(self.verdict.mask_form), record, self.recent)
        )

    def _judged(self, max_positions: int | None, graphs: bool, cache_dir: Path | None) -> Verdict:
        """The verdict that was kept, else a new one; the tree's places are what it says."""
        horizon_matters = max_positions is None or self._tree.rotation.passes(max_positions)
        kept = None if cache_dir is None else VerdictFile(cache_dir, self._model, horizon_matters, graphs)
        verdict = None if kept is None else kept.read()
        if verdict is not None:
            adopt(self._tree, verdict.findings)
            return verdict
        with torch.inference_mode():
            verdict = probe(self.decoder, max_positions=max_positions, graphs=graphs)
        if kept is not None:
            kept.write(verdict)
        return verdict

    def model_info(self, *, has_bos: bool, has_chat_template: bool, known_names: tuple[str, ...]) -> ModelInfo:
        """Sizes of the model, with what only the tokenizer knows."""
        cfg = self._tree.cfg
        n_key_value_heads = self.verdict.n_value_heads or cfg.n_key_value_heads or cfg.n_heads
        return ModelInfo(
            **self._names,
            n_layers=self._tree.n_layers,
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            n_key_value_heads=n_key_value_heads,
            d_head=cfg.d_head,
            d_mlp=max(self._finding(Point(n, MLP_POST)).width for n in range(self._tree.n_layers)) or cfg.d_mlp or 0,
            vocab_size=self.vocab_size,
            context_length=cfg.n_ctx,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self.device),
            has_bos=has_bos,
            has_chat_template=has_chat_template,
            known_names=known_names,
        )

    @property
    def n_layers(self) -> int:
        return self._tree.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._tree.cfg.d_model

    @property
    def context_length(self) -> int:
        """Positions that it was made for."""
        return self._tree.cfg.n_ctx

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has an embedding for."""
        return len(self._embedding.weight)

    @property
    def n_products(self) -> int:
        """Multiplications of a pass for each of its positions, the unembedding left out: as many as it has weights."""
        head: Any = self._model.get_output_embeddings()
        embeddings = {self._embedding.weight, head.weight}
        return self._model.num_parameters() - sum(one.numel() for one in embeddings)

    @property
    def _embedding(self) -> Any:
        return self._model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def unmerged_because(self) -> str:
        """Why rows of different requests do not decode together; empty if they do."""
        return self.verdict.unmerged_because

    @property
    def graphs_off_because(self) -> str:
        """Why decode steps run operation by operation; empty if they are replayed."""
        return self.verdict.unrecorded_because

    @property
    def has_rms_norms(self) -> bool:
        """Whether its norms leave in the mean of what they read."""
        return self._tree.rms_eps > 0

    def is_behind_norm(self, point: Point) -> bool:
        """Whether a contribution to the residual stream is what a norm makes of it."""
        return (self._tree.part_at(point) or "").startswith("ln")

    def readable_places(self) -> tuple[str, ...]:
        """Places that some layer has."""
        return tuple(place for place in READABLE if any(not f.unread_because for f in self._layers(place)))

    def writable_places(self) -> tuple[str, ...]:
        """Places at which some layer can be steered."""
        return tuple(place for place in WRITABLE if any(not f.unwritten_because for f in self._layers(place)))

    def check(self, point: Point, *, write: bool = False) -> None:
        """Raises UnknownPoint unless this model has the point (and, with `write`, can be steered there)."""
        if point.layer >= self._tree.n_layers:
            raise UnknownPoint(f"Unknown hook {point.name!r}: the model has layers 0 to {self._tree.n_layers - 1}.")
        finding = self._finding(point)
        if finding.unread_because:
            raise UnknownPoint(
                f"This model has no hook {point.name!r}: {finding.unread_because}. "
                f"Places in a block: {', '.join(self.readable_places())}."
            )
        if write and (finding.unwritten_because or point.place not in WRITABLE):
            because = f": {finding.unwritten_because}" if finding.unwritten_because else ""
            raise UnknownPoint(
                f"Cannot steer at {point.name!r}{because}. "
                f"Places that can be steered: {', '.join(self.writable_places())}."
            )

    def typical_norm(self, point: Point) -> float:
        """Of what is there; 0 where it is not known."""
        return self._finding(point).norm

    def typical_norms(self) -> dict[str, float]:
        """By hook, where the model can be steered."""
        found = sorted(self.verdict.findings.items())
        return {point.name: one.norm for point, one in found if one.norm and not one.unwritten_because}

    def width(self, point: Point) -> int:
        """Length of one position's vector at a point with heads concatenated."""
        return self._finding(point).width

    def watch(self, point: Point, reading: Reading, *, before: bool = False, proves: bool = False) -> Watch:
        """To read at a point that has been checked; computed points are read where they are computed from."""
        if point.place not in NORMALIZED:
            return Watch(point, reading, before, proves)
        read = _Normalized(reading, self._tree.rms_eps)
        return Watch(Point(point.layer, NORMALIZED[point.place]), read, before, proves)

    def unwatched_because(self, n_positions: int) -> str:
        """Why texts that may reach so many positions cannot be watched; empty if they can."""
        if not self._tree.rotation.passes(n_positions):
            return ""
        return (
            f"beyond {self._tree.rotation.horizon} tokens this model's angles depend on the length of the text, "
            "and what was read at earlier tokens would not be what the longer text has there"
        )

    def makes_pattern(self, points: Collection[Point]) -> bool:
        """Whether work at these points runs through attention that holds its whole pattern in memory."""
        config: Any = self._model.config
        text = config.get_text_config()
        reads_attention = any(point.is_inside_attention for point in points)
        return reads_attention or text._attn_implementation == "eager" or any(windows(text).values())

    def _lane_of_one(self) -> Lane:
        if self.unmerged_because:
            return Lane.alone(self.decoder)
        return Lane.merging(self.decoder, MaskForm(self.verdict.mask_form))

    def check_lens(self) -> None:
        """Raises InvalidRequest where this model's residual stream cannot be read out."""
        if self.verdict.no_lens_because:
            raise InvalidRequest(f"This model has no logit lens: {self.verdict.no_lens_because}.")

    @property
    def readout(self) -> Readout:
        """From the residual stream to logits; of a model that passes `check_lens`."""
        return Readout(self._tree)

    def token_effects(self, direction: Tensor, k: int) -> TokenEffects:
        """The k tokens that a direction of the residual stream [d_model] promotes and suppresses most."""
        return token_effects(self._tree, direction, k)

    def capture(self, prompts: Sequence[Sequence[int]], points: Collection[Point]) -> list[Captured]:
        """As `begin_capture`, of texts as they are, to its end in one pass."""
        capturing = self.begin_capture([only_read(prompt) for prompt in prompts], points)
        while not capturing.is_done:
            capturing.advance(capturing.n_tokens)
        return capturing.result()

    def begin_capture(
        self, rows: Sequence[RowSpec], points: Collection[Point], *, reproducible: bool = False
    ) -> Capturing:
        """A forward pass over right-padded prompts, edited as the rows say, ended at the last point wanted.

        Causal attention keeps the padding out of every real position. Where that is not enough, prompts run alone.
        `reproducible`: they do too, in pieces of a fixed size, whatever size is asked for.
        """
        sources = frozenset(Point(p.layer, NORMALIZED.get(p.place, p.place)) for p in points)
        is_alone = reproducible or bool(self.verdict.uncaptured_because)
        groups = [[row] for row in rows] if is_alone else [rows]
        passes = [CapturePass(self.decoder, group, sources) for group in groups]
        lengths = [len(row.prompt_ids) for row in rows]
        return Capturing(self, passes, lengths, points, reproducible=reproducible)

    def of_prompt(self, seen: Mapping[Point, Tensor], point: Point, row: int, length: int) -> Tensor:
        """One prompt's part of what a pass has seen: [pos, width], heads concatenated; patterns [heads, pos, pos]."""
        if point.place in NORMALIZED:
            resid = seen[Point(point.layer, NORMALIZED[point.place])][row, :length]
            return rms_normalized(resid, self._tree.rms_eps)
        if point.place == PATTERN:
            return seen[point][row, :, :length, :length]
        return seen[point][row, :length].flatten(1)

    def _finding(self, point: Point) -> Finding:
        return self.verdict.findings[point]

    def _layers(self, place: str) -> list[Finding]:
        return [self._finding(Point(layer, place)) for layer in range(self._tree.n_layers)]


@dataclass(frozen=True, eq=False)
class _Normalized:
    """A reading of the residual stream as an RMS norm sees it, before the norm's gain."""

    reading: Reading
    eps: float

    @property
    def key(self) -> Hashable:
        return "normalized", self.reading.key

    @property
    def n_numbers(self) -> int:
        return self.reading.n_numbers

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.reading(rms_normalized(hidden, self.eps))


def n_bytes(kept: Any) -> int:
    """Of a tensor or an array, or of lists and mappings of them."""
    if isinstance(kept, Tensor | np.ndarray):
        return kept.nbytes
    return sum(map(n_bytes, kept.values() if isinstance(kept, Mapping) else kept or ()))


class Capturing:
    """A capture under way, all at once or in pieces."""

    def __init__(
        self,
        engine: ModelEngine,
        passes: Sequence[CapturePass],
        lengths: Sequence[int],
        points: Collection[Point],
        *,
        reproducible: bool,
    ) -> None:
        """`passes`: one over all prompts, or one for each. lengths: of the prompts."""
        self._reproducible = reproducible
        self._engine = engine
        self._passes = passes
        self._lengths = lengths
        self._points = points
        self.n_tokens = sum(one.n_tokens for one in passes)
        """Of all prompts, padding included."""
        self.depth = (1 + max(point.layer for point in points)) / engine.n_layers
        """Share of the layers that it runs."""

    @property
    def is_done(self) -> bool:
        return all(one.is_done for one in self._passes)

    def advance(self, n_tokens: int) -> int:
        """Run about so many tokens more, at least one of each prompt; how many it were. After an exception: no more."""
        running = next(one for one in self._passes if not one.is_done)
        if self._reproducible:
            with torch_products():
                return running.advance(running.width if self._engine.unmerged_because else FIXED_POSITIONS)
        n_rows = running.n_tokens // running.width
        n_positions = running.width if self._engine.unmerged_because else max(1, n_tokens // n_rows)
        return n_rows * running.advance(n_positions)

    def result(self) -> list[Captured]:
        """Per prompt and point: [pos, width], heads concatenated; `attn.hook_pattern` [heads, pos, pos]."""
        rows = [(one.seen, row) for one in self._passes for row in range(one.n_tokens // one.width)]
        return [
            {point: self._engine.of_prompt(seen, point, row, length) for point in self._points}
            for (seen, row), length in zip(rows, self._lengths, strict=True)
        ]
