"""The package data: Jacobians of the layers whose lens says more than the logit lens, and what was measured of all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from neuronpedia_inference import embedded

from .fit import EVERY, SINK
from .texts import COUNTS, LENGTH, Texts

LEAST_CORRELATION = 0.9
"""With finite differences."""


def write_jacobians(
    jacobians: Mapping[int, Tensor], measured: Mapping[str, Any], texts: Texts, n_positions: int
) -> None:
    layers = {
        str(layer): {**measured["agreement"]["layers"][str(layer)], **measured["differences"][str(layer)]}
        for layer in sorted(jacobians)
    }
    kept = [layer for layer, numbers in layers.items() if _is_kept(numbers)]
    about = {
        "d_model": len(next(iter(jacobians.values()))),
        "n_prompts": len(texts.fitted),
        "provenance": "the last block's output by the block's, at the same position",
    }
    tensors = {layer: jacobians[int(layer)].to(torch.float16).contiguous() for layer in kept}
    save_file(tensors, embedded.JACOBIANS, {name: str(value) for name, value in about.items()})
    numbers = {
        "kept": kept,
        "fitted": {
            "texts": len(texts.fitted),
            "tokens": LENGTH,
            "positions": n_positions,
            "every": EVERY,
            "sink": SINK,
        },
        "held_out": {"texts": len(texts.held_out), "positions": measured["agreement"]["positions"]},
        "sources": {key: {"fitted": one, "held_out": other} for key, (one, other) in COUNTS.items()},
        "layers": layers,
    }
    embedded.JACOBIAN_METRICS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _is_kept(numbers: Mapping[str, float]) -> bool:
    is_right = min(numbers["own"], numbers["fitted"]) >= LEAST_CORRELATION
    return is_right and numbers["jacobian_lens"] > numbers["logit_lens"]
