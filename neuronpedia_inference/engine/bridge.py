"""The engine over TransformerLens's bridge.

The bridge rebuilds a Hugging Face model's module tree around hook points. Here it gets a twin of the model: a second
tree over the same tensors. So the bridge can reach every hook, while the model itself stays as Hugging Face wrote it,
with its own attention kernels and no overhead, for work that touches only the residual stream between blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformers import PreTrainedModel

from neuronpedia_inference.engine.generation import BatchGeneration
from neuronpedia_inference.engine.hooks import BlockSite, BridgeSite, Capture, Site
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
from neuronpedia_inference.engine.protocol import Captured, ModelInfo, RowSpec
from neuronpedia_inference.errors import StartupError, UnknownPoint

_PROBE = (1, 2, 3, 5, 8, 13, 21)
_PROBE_LAYER = 5
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class BridgeEngine:
    """One model on one device. Not thread-safe: the worker owns it."""

    def __init__(self, model: PreTrainedModel, *, model_id: str, name: str, stop_ids: Iterable[int]) -> None:
        """Raises StartupError for an architecture that the bridge does not know."""
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
        self._block_site = BlockSite(_descend(model, mapping["blocks"].name))
        self._rms_eps = _rms_eps(model.config)
        self._base_info = {"model_id": model_id, "name": name, "family": architecture}
        self.cfg: Any = bridge.cfg
        with torch.inference_mode():
            self.direct = self._direct_path_agrees()
            self._mid_is_sum = self._resid_mid_is_sum()

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
            vocab_size=cfg.d_vocab,
            context_length=cfg.n_ctx,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self.device),
            has_bos=has_bos,
            has_chat_template=has_chat_template,
            known_names=known_names,
        )

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

    def capture(self, prompts: Sequence[Sequence[int]], points: Collection[Point]) -> list[Captured]:
        """One forward pass over right-padded prompts, ended at the last point wanted.

        Per prompt and point: [pos, width], heads concatenated; `attn.hook_pattern` [heads, pos, pos].
        Causal attention keeps the padding out of every real position.
        """
        sources = frozenset(Point(p.layer, NORMALIZED.get(p.place, p.place)) for p in points)
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        seen = self._run_capture(ids.to(self.device), sources)
        return [self._row(seen, points, row, length) for row, length in enumerate(lengths)]

    def generate(self, rows: Sequence[RowSpec]) -> BatchGeneration:
        """Prefill the rows, all of the same prompt length, as one batch."""
        points = {steering.point for row in rows for steering in row.steering}
        model, site = self._route(points)
        return BatchGeneration(model, site, rows, stop_ids=self.stop_ids, vocab_size=self.cfg.d_vocab)

    def _route(self, points: Collection[Point]) -> tuple[PreTrainedModel, Site]:
        """The cheapest module tree that has all the points."""
        if self.direct and all(point.is_residual for point in points):
            return self._model, self._block_site
        return self._twin, self._bridge_site

    def _run_capture(self, ids: Tensor, points: frozenset[Point]) -> dict[Point, Tensor]:
        model, site = self._route(points)
        capture = Capture(points)
        with capture.on(site):
            model(input_ids=ids, use_cache=False)
        return capture.seen

    def _row(self, seen: dict[Point, Tensor], points: Collection[Point], row: int, length: int) -> Captured:
        return {point: self._cut(seen, point, row, length) for point in points}

    def _cut(self, seen: dict[Point, Tensor], point: Point, row: int, length: int) -> Tensor:
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

    def _direct_path_agrees(self) -> bool:
        """Whether the plain model and the bridge compute the same residual stream; else the bridge serves all."""
        # Not deeper: rounding in 16 bits grows from layer to layer until it hides what is looked for.
        point = Point(min(_PROBE_LAYER, self.cfg.n_layers - 1), RESID_POST)
        ids = self._probe()
        self.direct = True
        direct = self._run_capture(ids, frozenset({point}))[point]
        self.direct = False
        bridged = self._run_capture(ids, frozenset({point}))[point]
        return _relative_error(direct, bridged) < _TOLERANCE.get(self.dtype, 5e-2)

    def _resid_mid_is_sum(self) -> bool:
        """Whether resid_mid = resid_pre + attn_out, which is how resid_mid is steered."""
        pre, out, mid = (Point(0, place) for place in (RESID_PRE, ATTN_OUT, RESID_MID))
        if not all(p in self._bridge_site for p in (pre, out, mid)):
            return False
        seen = self._run_capture(self._probe(), frozenset({pre, out, mid}))
        return _relative_error(seen[pre] + seen[out], seen[mid]) < _TOLERANCE.get(self.dtype, 5e-2)

    def _probe(self) -> Tensor:
        return torch.tensor([_PROBE], device=self.device) % self.cfg.d_vocab


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


def _relative_error(one: Tensor, other: Tensor) -> float:
    one, other = one.float(), other.float()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-6)).max())
