"""SAEs of the two plainest kinds, standard and JumpReLU, as SAELens 6 writes them: read without importing SAELens.

Importing it takes longer than reading what most folders hold. Whatever a folder says beyond the plainest is left to it.

    standard    relu((x − [apply_b_dec_to_input] b_dec) W_enc + b_enc)     Cunningham et al., arXiv 2309.08600
    jumprelu    the same where it was more than the threshold, else 0      Rajamanoharan et al., arXiv 2407.14435
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from neuronpedia_inference.saes.kinds import LEAST_NORM, shapes_of

PLAIN = ("standard", "jumprelu")
_NEEDED = {"architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "metadata"}
_ALLOWED = _NEEDED | {"dtype", "device", "reshape_activations"}


@dataclass(frozen=True)
class PlainConfig:
    """Of a `cfg.json` in which nothing is left to SAELens."""

    kind: str
    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool
    metadata: Mapping[str, Any]
    normalize_activations: str = "none"

    def architecture(self) -> str:
        return self.kind


def plain_config(config: Mapping[str, Any]) -> PlainConfig | None:
    """None for what is not wholly understood here. config: as in `cfg.json`."""
    metadata, sizes = config.get("metadata"), (config.get("d_in"), config.get("d_sae"))
    is_plain = (
        _NEEDED <= config.keys() <= _ALLOWED
        and isinstance(config["architecture"], str)
        and config["architecture"] in PLAIN
        and config["normalize_activations"] == "none"
        and config.get("reshape_activations", "none") == "none"
        and isinstance(config["apply_b_dec_to_input"], bool)
        and all(type(size) is int and size > 0 for size in sizes)
        and isinstance(metadata, dict)
        and str(metadata.get("sae_lens_version", "")).startswith("6.")
    )
    if not is_plain or not isinstance(metadata, dict):
        return None
    return PlainConfig(
        config["architecture"], config["d_in"], config["d_sae"], config["apply_b_dec_to_input"], metadata
    )


class PlainSae(nn.Module):
    """With the names that SAELens's SAEs have."""

    activation_fn = nn.ReLU()
    W_enc: Tensor
    """[d_in, d_sae]"""
    W_dec: Tensor
    """[d_sae, d_in]"""
    b_enc: Tensor
    """[d_sae]"""
    b_dec: Tensor
    """[d_in]"""
    threshold: Tensor
    """[d_sae], of JumpReLU"""

    def __init__(self, cfg: PlainConfig) -> None:
        """On a device named `meta`, where weights are to be assigned."""
        super().__init__()
        self.cfg = cfg
        for name, shape in _shapes(cfg).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def encode(self, x: Tensor) -> Tensor:
        """[pos, d_in] -> [pos, d_sae]"""
        before = self.process_sae_in(x) @ self.W_enc + self.b_enc
        acts = self.activation_fn(before)
        return acts * (before > self.threshold).to(acts.dtype) if self.cfg.kind == "jumprelu" else acts

    def process_sae_in(self, x: Tensor) -> Tensor:
        """[pos, d_in] -> [pos, d_in]"""
        x = x.to(self.W_enc.dtype)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def fold_W_dec_norm(self) -> None:
        """Decoder rows get unit norm, and activations the old one."""
        norms = self.W_dec.norm(dim=-1).clamp(min=LEAST_NORM)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        if self.cfg.kind == "jumprelu":
            self.threshold.mul_(norms)


def load_plain(cfg: PlainConfig, file: Path, dtype: str) -> PlainSae | None:
    """The SAE, or None if the file holds other tensors than its configuration says.

    dtype: a torch dtype's name. Raises OSError or SafetensorError for a file that cannot be read.
    """
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        if shapes != _shapes(cfg):
            return None
        # A copy even in the same precision: what is read is mapped from the file, and norms are folded in place.
        weights = {name: tensors.get_tensor(name).to(getattr(torch, dtype), copy=True) for name in names}
    module = PlainSae(cfg)
    module.load_state_dict(weights, assign=True)
    return module


def _shapes(cfg: PlainConfig) -> dict[str, tuple[int, ...]]:
    return shapes_of(cfg)
