"""One model, and where its places are: inputs and outputs of Hugging Face's own modules.

TransformerLens's adapters say which module of an architecture plays which part: no list of architectures is kept
here. Where several modules could hold what a place means (a norm after the attention, or the attention itself), all
are candidates, and the probe finds out which of them it is, if any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuronpedia_inference.engine.attention import AttentionReader
from neuronpedia_inference.engine.description import Part, describe
from neuronpedia_inference.engine.hooks import Edit, Remove
from neuronpedia_inference.engine.rotation import Rotation
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.points import (
    ATTN_IN,
    ATTN_OUT,
    HOOK_Z,
    MLP_IN,
    MLP_OUT,
    MLP_POST,
    MLP_PRE,
    MLP_PRE_LINEAR,
    NORMALIZED,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    Point,
)

IN, OUT = True, False
BLOCK = ""
CANDIDATES: Mapping[str, Sequence[tuple[str, bool]]] = {
    RESID_PRE: ((BLOCK, IN),),
    HOOK_Z: (("attn.o", IN),),
    ATTN_OUT: (("ln1_post", OUT), ("ln1", OUT), ("attn", OUT), ("attn.o", OUT), ("linear_attn", OUT)),
    RESID_MID: (("ln2", IN), ("mlp", IN)),
    MLP_OUT: (("ln2_post", OUT), ("ln2", OUT), ("mlp", OUT), ("mlp.out", OUT)),
    RESID_POST: ((BLOCK, OUT),),
    ATTN_IN: (("attn", IN), ("linear_attn", IN)),
    "attn.hook_out": (("attn.o", OUT), ("linear_attn", OUT), ("attn", OUT)),
    MLP_IN: (("mlp", IN), ("mlp.in", IN)),
    "mlp.hook_out": (("mlp.out", OUT), ("mlp", OUT)),
    MLP_PRE: (("mlp.gate", OUT), ("mlp.in", OUT)),
    MLP_PRE_LINEAR: (("mlp.in", OUT),),
    MLP_POST: (("mlp.out", IN),),
    "ln1.hook_in": (("ln1", IN),),
    "ln1.hook_out": (("ln1", OUT),),
    "ln2.hook_in": (("ln2", IN),),
    "ln2.hook_out": (("ln2", OUT),),
    "attn.o.hook_out": (("attn.o", OUT),),
}
"""Place -> the parts of a block whose input or output may be it, the likeliest first. Names as TransformerLens's."""


@dataclass(frozen=True, slots=True)
class ModuleSide:
    """The input or the output of a module."""

    module: nn.Module
    on_input: bool


class Tree:
    """A model with its places. The one way into the model is `run`."""

    def __init__(self, model: PreTrainedModel, cache_dir: Path | None = None) -> None:
        """cache_dir: where descriptions of architectures are kept.

        Raises StartupError for an architecture that TransformerLens does not know.
        """
        self.model = model
        self.cfg = describe(model, cache_dir)
        self.architecture, parts = self.cfg.architecture, self.cfg.parts
        self.blocks: Sequence[nn.Module] = list(_descend(model, parts["blocks"].name or "") or ())
        if not self.blocks:
            raise StartupError(
                f"No blocks of {self.architecture} at {parts['blocks'].name!r} in {type(model).__name__}."
            )
        self.rotation = Rotation(model)
        self.rms_eps = _rms_eps(model.config)
        """Epsilon of RMS norms; 0 for other norms."""
        self._parts = [dict(_parts(block, parts["blocks"].submodules)) | {BLOCK: block} for block in self.blocks]
        self._attention = AttentionReader([parts.get("attn") for parts in self._parts])
        final = parts.get("ln_final")
        self.final_norm = None if final is None else _descend(model, final.name or "")
        self._sides: Mapping[Point, ModuleSide] = {}
        self._n_rows = 0

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def part(self, layer: int, name: str) -> nn.Module | None:
        """The module that plays a part in a block, `attn.o`."""
        return self._parts[layer].get(name)

    def candidates(self, point: Point) -> Sequence[ModuleSide | None]:
        """What may be the place, in the order of CANDIDATES; None for parts that this block lacks."""
        parts = self._parts[point.layer]
        found = [(parts.get(part), on_input) for part, on_input in CANDIDATES[point.place]]
        return [None if module is None else ModuleSide(module, on_input) for module, on_input in found]

    def part_at(self, point: Point) -> str | None:
        """The part of its block whose input or output a place is; None for those that are computed."""
        side = self._sides.get(point)
        if side is None:
            return None
        named = zip(CANDIDATES[point.place], self.candidates(point), strict=True)
        return next(name for (name, _), one in named if one == side)

    def adopt(self, chosen: Mapping[Point, int]) -> None:
        """From now on these are the places: which of its candidates each point is."""
        sides = {point: self.candidates(point)[which] for point, which in chosen.items()}
        self._sides = {point: side for point, side in sides.items() if side is not None}

    def attach(self, point: Point, edit: Edit) -> Remove:
        """Install `edit` at `point`; the answer removes it. It only reads inside attention and at computed places."""
        if point.is_inside_attention:
            return self._attention.attach(point.layer, point.place, edit)
        if point.place in NORMALIZED:
            return self.hook(self._sides[Point(point.layer, NORMALIZED[point.place])], self._of_normalised(edit))
        return self.hook(self._sides[point], edit)

    def hook(self, side: ModuleSide, edit: Edit) -> Remove:
        """As `attach`, at any module."""
        if side.on_input:
            return side.module.register_forward_pre_hook(self._on_input(edit), with_kwargs=True).remove
        return side.module.register_forward_hook(self._on_output(edit)).remove

    def run(self, ids: Tensor, **inputs: Any) -> Any:
        """[row, pos] ids -> what the model's forward gives."""
        self._n_rows = len(ids)
        self.rotation.begin()
        return self.model(input_ids=ids.to(self.model.device), **inputs)

    def _of_normalised(self, edit: Edit) -> Edit:
        def read(resid: Tensor) -> None:
            edit(rms_normalized(resid, self.rms_eps))

        return read

    def _changed(self, edit: Edit, tensor: Tensor) -> Tensor | None:
        """Some architectures flatten rows and positions into one axis; edits always see [row, pos, ...]."""
        if tensor.ndim > 2:
            return edit(tensor)
        changed = edit(tensor.unflatten(0, (self._n_rows, -1)))
        return None if changed is None else changed.flatten(0, 1)

    def _on_input(self, edit: Edit) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                changed = self._changed(edit, args[0])
                return None if changed is None else ((changed, *args[1:]), kwargs)
            if "hidden_states" not in kwargs:
                return None
            changed = self._changed(edit, kwargs["hidden_states"])
            return None if changed is None else (args, {**kwargs, "hidden_states": changed})

        return hook

    def _on_output(self, edit: Edit) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                changed = self._changed(edit, output[0])
                return None if changed is None else (changed, *output[1:])
            return self._changed(edit, output)

        return hook


def rms_normalized(resid: Tensor, eps: float) -> Tensor:
    """[..., width] -> the same before a norm's gain, float32: x / sqrt(mean(x²) + eps)."""
    wide = resid.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _parts(parent: nn.Module, components: Mapping[str, Part], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts that the block really has. Of a mixture of experts' block that is dense, the dense ones."""
    has_dense = any(key.startswith("dense_") for key in components)
    for key, component in components.items():
        if has_dense and key in ("gate", "in", "out"):
            continue  # of the same names, the router
        module = parent if component.name is None else _descend(parent, component.name)
        if isinstance(module, nn.Module):
            name = prefix + key.removeprefix("dense_")
            if module is not parent:
                yield name, module
            yield from _parts(module, component.submodules, f"{name}.")


def _descend(module: Any, path: str) -> Any:
    """The module at a path; None where there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _rms_eps(config: Any) -> float:
    return float(getattr(config.get_text_config(), "rms_norm_eps", 0.0) or 0.0)
