"""What an SAE gives, from the file that its training wrote, in arithmetic written out by hand.

Decoder rows are given unit norm, and encoder columns, biases and thresholds the old one, as the wire's activations have
it. With x what the SAE reads, less its decoder's bias where it says so:

    standard    relu(x W_enc + b_enc)                                                         arXiv 2309.08600
    jumprelu    the same where it is more than the threshold, else 0                          arXiv 2407.14435
    gated       relu(x (W_enc exp(r_mag)) + b_mag) where x W_enc + b_gate is positive, else 0     arXiv 2404.16014
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

KINDS = ("standard", "jumprelu", "gated")
_LEAST_NORM = 1e-8


@dataclass(frozen=True)
class WrittenSae:
    """As it lies in a folder."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    """float32"""

    @property
    def is_centred(self) -> bool:
        """Whether its model's writing weights are to be, so that what it reads has a mean of zero."""
        asked = self.config.get("metadata", {}).get("model_from_pretrained_kwargs") or {}
        return bool(asked.get("center_writing_weights"))

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[pos, width] -> all [pos, feature]: activations, how far each is from its threshold, and the size of what
        they are sums of.
        """
        w = self.weights
        norms = w["W_dec"].norm(dim=1).clamp(min=_LEAST_NORM)
        x = x.float().cpu()
        if self.is_centred:
            x = x - x.mean(dim=1, keepdim=True)
        size = x.norm(dim=1, keepdim=True)
        if self.config.get("apply_b_dec_to_input"):
            size = size + w["b_dec"].norm()
            x = x - w["b_dec"]
        if self.config["architecture"] == "gated":
            columns, bias = w["W_enc"] * w["r_mag"].exp(), w["b_mag"]
            edge = x @ w["W_enc"] + w["b_gate"]
        else:
            columns, bias = w["W_enc"], w["b_enc"]
            edge = x @ columns + bias - w.get("threshold", torch.zeros(1))
        fires = (edge > 0) & (x @ columns + bias > 0)
        made_of = size * columns.norm(dim=0) + bias.abs()
        return ((x @ columns + bias) * fires * norms, edge.abs() * norms, made_of * norms)


def written(folder: Path) -> WrittenSae | str:
    """The SAE in a folder, or why it is not compared."""
    if not (folder / "sae_weights.safetensors").is_file():
        return "it is not in SAELens's format"
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    if config.get("architecture") not in KINDS:
        return f"the architecture {config.get('architecture')!r} is not among {', '.join(KINDS)}"
    if config.get("normalize_activations", "none") != "none":
        return f"its input is normalised by {config['normalize_activations']!r}"
    weights = {name: tensor.float() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    return WrittenSae(config, weights)
