"""The engine over TransformerLens's bridge.

The bridge rebuilds a Hugging Face model's module tree around hook points. Here it gets a twin of the model: a second
tree over the same tensors. So the bridge can reach every hook, while the model itself stays as Hugging Face wrote it,
with its own attention kernels and no overhead, for work that touches only the residual stream between blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformers import PreTrainedModel

from neuronpedia_inference.engine.agreement import merging_agrees, nearly_equal, recording_agrees
from neuronpedia_inference.engine.cache import slides
from neuronpedia_inference.engine.decoder import Decoder
from neuronpedia_inference.engine.generation import Lane, SoloLane
from neuronpedia_inference.engine.hooks import BlockSite, BridgeSite
from neuronpedia_inference.engine.points import (
    ATTN_OUT,
    HOOK_Z,
    NORMALIZED,
    PATTERN,
    READABLE,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    WRITABLE,
    Point,
)
from neuronpedia_inference.engine.prompts import CapturePass
from neuronpedia_inference.engine.protocol import Captured, ModelInfo, RowSpec
from neuronpedia_inference.engine.static import Record, as_cuda_graph
from neuronpedia_inference.errors import StartupError, UnknownPoint

MERGING = frozenset(
    (
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "Gemma2ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GPTNeoXForCausalLM",
    )
)
"""Architectures whose rows are proven, by the tests, to be the same merged as alone."""

_PROBE = (1, 2, 3, 5, 8, 13, 21)
_PROBE_LAYER = 5


class BridgeEngine:
    """One model on one device. Not thread-safe: the worker owns it."""

    def __init__(
        self, model: PreTrainedModel, *, model_id: str, name: str, stop_ids: Iterable[int], graphs: bool = False
    ) -> None:
        """`graphs`: replay decode steps as CUDA graphs if the device can; `graphs_off_because` says why not.

        Raises StartupError for an architecture that the bridge does not know.
        """
        self.stop_ids = frozenset(stop_ids)
        self._model = model
        self._twin = _twin(model)
        architecture = _architecture(model)
        try:
            bridge = build_bridge_from_module(self._twin, architecture, hf_config=self._twin.config, model_name=name)
        except (ValueError, NotImplementedError, AttributeError, KeyError) as exc:
            raise StartupError(
                f"TransformerLens cannot serve the architecture {architecture} of {name!r}: {exc}"
            ) from exc
        self._bridge_site = BridgeSite(bridge.hook_dict)
        mapping: Any = bridge.adapter.component_mapping
        block_site = BlockSite(_descend(model, mapping["blocks"].name))
        self._rms_eps = _rms_eps(model.config)
        self._base_info = {"model_id": model_id, "name": name, "family": architecture}
        self.cfg: Any = bridge.cfg
        self._plain = Decoder(model, block_site, self.stop_ids)
        self._bridged = Decoder(self._twin, self._bridge_site, self.stop_ids)
        self.direct = False
        with torch.inference_mode():
            self.direct = self._direct_path_agrees()
            self._mid_is_sum = self._resid_mid_is_sum()
            self.unmerged_because = self._why_not_merge()
            self.graphs_off_because = self._why_no_graphs() if graphs else "CUDA_GRAPHS is off"
        record = None if self.graphs_off_because else as_cuda_graph
        self._plain_lane, self._bridged_lane = self._lane(self._plain, record), self._lane(self._bridged)

    def model_info(self, *, has_bos: bool, has_chat_template: bool, known_names: tuple[str, ...]) -> ModelInfo:
        """Sizes of the model, with what only the tokenizer knows."""
        cfg = self.cfg
        return ModelInfo(
            id=self._base_info["model_id"],
            name=self._base_info["name"],
            family=self._base_info["family"],
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            n_key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_head=cfg.d_head,
            d_mlp=cfg.d_mlp or 0,
            vocab_size=len(self._embedding.weight),
            context_length=cfg.n_ctx,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self.device),
            has_bos=has_bos,
            has_chat_template=has_chat_template,
            known_names=known_names,
        )

    @property
    def _embedding(self) -> Any:
        return self._model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    def readable_places(self) -> tuple[str, ...]:
        """Places that exist in this model, checked on its first layer."""
        return tuple(place for place in READABLE if self._exists(Point(0, place)))

    def writable_places(self) -> tuple[str, ...]:
        """Places that can be steered in this model."""
        places = (p for p in WRITABLE if self._exists(Point(0, p)))
        return tuple(p for p in places if p != RESID_MID or self._mid_is_sum)

    def check(self, point: Point, *, write: bool = False) -> None:
        """Raises UnknownPoint unless this model has the point (and, with `write`, can be steered there)."""
        if point.layer >= self.cfg.n_layers:
            raise UnknownPoint(f"Unknown hook {point.name!r}: the model has layers 0 to {self.cfg.n_layers - 1}.")
        if not self._exists(point):
            raise UnknownPoint(
                f"This model has no hook {point.name!r}. Places in a block: {', '.join(self.readable_places())}."
            )
        if write and point.place not in self.writable_places():
            raise UnknownPoint(
                f"Cannot steer at {point.name!r}. Places that can be steered: {', '.join(self.writable_places())}."
            )

    def width(self, point: Point) -> int:
        """Length of one position's vector at a point with heads concatenated."""
        cfg = self.cfg
        if point.place == HOOK_Z:
            return cfg.n_heads * cfg.d_head
        if point.place == "attn.hook_v":
            return (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
        return cfg.d_mlp if point.place in ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post") else cfg.d_model

    def makes_pattern(self, points: Collection[Point]) -> bool:
        """Whether work at these points runs through attention that holds its whole pattern in memory."""
        config: Any = self._route(points).model.config
        return config._attn_implementation == "eager" or slides(config.get_text_config())

    def capture(self, prompts: Sequence[Sequence[int]], points: Collection[Point]) -> list[Captured]:
        """As `begin_capture`, to its end in one pass."""
        capturing = self.begin_capture(prompts, points)
        capturing.advance(capturing.n_tokens)
        return capturing.result()

    def begin_capture(self, prompts: Sequence[Sequence[int]], points: Collection[Point]) -> Capturing:
        """A forward pass over right-padded prompts, ended at the last point wanted.

        Causal attention keeps the padding out of every real position.
        """
        sources = frozenset(Point(p.layer, NORMALIZED.get(p.place, p.place)) for p in points)
        return Capturing(self, CapturePass(self._route(sources), prompts, sources), [len(p) for p in prompts], points)

    @property
    def lanes(self) -> tuple[Lane | SoloLane, ...]:
        return self._plain_lane, self._bridged_lane

    def lane(self, rows: Sequence[RowSpec]) -> Lane | SoloLane:
        """The lane of the cheapest module tree that has all the points at which these rows are steered."""
        tree = self._route({steering.point for row in rows for steering in row.steering})
        return self._plain_lane if tree is self._plain else self._bridged_lane

    def _route(self, points: Collection[Point]) -> Decoder:
        """The cheapest module tree that has all the points."""
        return self._plain if self.direct and all(point.is_residual for point in points) else self._bridged

    def _probed(self, *points: Point) -> dict[Point, Tensor]:
        """[1, pos, ...] at every point of the probe."""
        probe = CapturePass(self._route(points), [self._probe()], points)
        probe.advance(probe.width)
        return probe.seen

    def of_prompt(self, seen: Mapping[Point, Tensor], point: Point, row: int, length: int) -> Tensor:
        """One prompt's part of what a pass has seen: [pos, width], heads concatenated; patterns [heads, pos, pos]."""
        if point.place in NORMALIZED:
            resid = seen[Point(point.layer, NORMALIZED[point.place])][row, :length].float()
            return resid * torch.rsqrt(resid.pow(2).mean(-1, keepdim=True) + self._rms_eps)
        if point.place == PATTERN:
            return seen[point][row, :, :length, :length]
        return seen[point][row, :length].flatten(1)

    def _exists(self, point: Point) -> bool:
        if point.place in NORMALIZED:
            return self._rms_eps > 0 and self._exists(Point(point.layer, NORMALIZED[point.place]))
        return point in self._bridge_site

    def _why_not_merge(self) -> str:
        """Why rows of different requests must not decode together; empty if they may."""
        family, probe = self._base_info["family"], self._probe()
        if family not in MERGING:
            return f"{family} has not been proven to decode in merged batches"
        if not all(merging_agrees(tree, probe) for tree in (self._plain, self._bridged)):
            return "merged rows came out different from rows alone on this model"
        return ""

    def _why_no_graphs(self) -> str:
        """Why decode steps run operation by operation; empty if they are replayed."""
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"
        if self.unmerged_because or not self.direct:
            return self.unmerged_because or "the bridge serves this model"
        try:
            agrees = recording_agrees(self._plain, as_cuda_graph, self._probe())
        except RuntimeError as exc:
            return f"a step could not be recorded: {' '.join(str(exc).split())[:200]}"
        return "" if agrees else "recorded steps came out different from others on this model"

    def _lane(self, decoder: Decoder, record: Record | None = None) -> Lane | SoloLane:
        return SoloLane(decoder) if self.unmerged_because else Lane.merging(decoder, record)

    def _direct_path_agrees(self) -> bool:
        """Whether the plain model and the bridge compute the same residual stream; else the bridge serves all."""
        # Not deeper: rounding in 16 bits grows from layer to layer until it hides what is looked for.
        point = Point(min(_PROBE_LAYER, self.cfg.n_layers - 1), RESID_POST)
        self.direct = True
        direct = self._probed(point)[point]
        self.direct = False
        bridged = self._probed(point)[point]
        return nearly_equal(direct, bridged, self.dtype)

    def _resid_mid_is_sum(self) -> bool:
        """Whether resid_mid = resid_pre + attn_out, which is how resid_mid is steered."""
        pre, out, mid = (Point(0, place) for place in (RESID_PRE, ATTN_OUT, RESID_MID))
        if not all(p in self._bridge_site for p in (pre, out, mid)):
            return False
        seen = self._probed(pre, out, mid)
        return nearly_equal(seen[pre] + seen[out], seen[mid], self.dtype)

    def _probe(self) -> list[int]:
        return [token % self.cfg.d_vocab for token in _PROBE]


class Capturing:
    """A capture under way, all at once or in pieces."""

    def __init__(
        self, engine: BridgeEngine, passing: CapturePass, lengths: Sequence[int], points: Collection[Point]
    ) -> None:
        self._engine = engine
        self._pass = passing
        self._lengths = lengths
        self._points = points
        self.n_tokens = passing.width * len(lengths)
        """Of all prompts, padding included."""
        self.depth = (1 + max(point.layer for point in points)) / engine.cfg.n_layers
        """Share of the layers that it runs."""

    @property
    def is_done(self) -> bool:
        return self._pass.is_done

    def advance(self, n_tokens: int) -> int:
        """Run about so many tokens more, at least one of each prompt; how many it were. After an exception: no more."""
        in_pieces = not self._engine.unmerged_because
        n_positions = max(1, n_tokens // len(self._lengths)) if in_pieces else self._pass.width
        return len(self._lengths) * self._pass.advance(n_positions)

    def result(self) -> list[Captured]:
        """Per prompt and point: [pos, width], heads concatenated; `attn.hook_pattern` [heads, pos, pos]."""
        seen, cut = self._pass.seen, self._engine.of_prompt
        return [{p: cut(seen, p, row, length) for p in self._points} for row, length in enumerate(self._lengths)]


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the very same parameters and buffers, with attention that exposes its pattern."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation("eager")
    return twin


def _architecture(model: PreTrainedModel) -> str:
    config: Any = model.config
    if not config.architectures:
        config.architectures = [type(model).__name__]
    return determine_architecture_from_hf_config(config)


def _descend(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


def _rms_eps(config: Any) -> float:
    """The epsilon of an RMS-norm model, 0 for other norms."""
    return float(getattr(config.get_text_config(), "rms_norm_eps", 0.0) or 0.0)
