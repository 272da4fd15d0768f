"""The embedded SAEs by their formula, for contenders that have none. Torch and safetensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class Sae:
    """JumpReLU: `z = (x - b_dec) W_enc + b_enc`, and `z` where it passes the threshold, else 0.

    Decoder rows are scaled to unit length, which scales encoder, bias and threshold the other way.
    """

    def __init__(self, folder: Path) -> None:
        weights = {name: tensor.float() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
        length = weights["W_dec"].norm(dim=1)
        self.b_dec = weights["b_dec"]
        self.w_enc = weights["W_enc"] * length
        self.b_enc, self.threshold = weights["b_enc"] * length, weights["threshold"] * length
        self._columns: dict[int, torch.Tensor] = {}

    @classmethod
    def load_all(cls, folder: str) -> dict[int, Sae]:
        """Every SAE under `folder`, by the layer after which it reads."""
        loaded: dict[int, Sae] = {}
        for path in sorted(Path(folder).iterdir()):
            if (path / "cfg.json").exists():
                config = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
                assert (config["architecture"], config["apply_b_dec_to_input"]) == ("jumprelu", True), config
                loaded[int(config["metadata"]["hook_name"].split(".")[1])] = cls(path)
        return loaded

    def one_feature(self, resid: torch.Tensor, index: int) -> torch.Tensor:
        """`[row, pos, d_model]` -> `[row, pos]`"""
        if index not in self._columns:
            self._columns[index] = self.w_enc[:, index].clone()
        return _jump((resid - self.b_dec) @ self._columns[index] + self.b_enc[index], self.threshold[index])

    def encode(self, resid: torch.Tensor) -> torch.Tensor:
        """`[pos, d_model]` -> `[pos, d_sae]`"""
        return _jump(torch.addmm(self.b_enc, resid - self.b_dec, self.w_enc), self.threshold)


def _jump(before: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return before.relu() * (before > threshold)


def strongest(by_layer: Mapping[int, torch.Tensor], n_results: int) -> list[list[Any]]:
    """`[layer, index, values]` of the features with the largest values, best first; BOS counts as 0.

    `by_layer`: `[pos, d_sae]` for each layer; the first row is set to 0 in place.
    """
    found: list[tuple[float, int, int]] = []
    for layer, acts in by_layer.items():
        acts[0] = 0
        best = acts.amax(0).topk(n_results)
        found += zip(best.values.tolist(), [layer] * n_results, best.indices.tolist(), strict=True)
    found.sort(key=lambda one: -one[0])
    return [[layer, index, by_layer[layer][:, index].tolist()] for _, layer, index in found[:n_results]]


def pad(rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `[row, pos]`; `side` is where the padding goes, "left" or "right"."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[place, where] = torch.tensor(row)
        mask[place, where] = 1
    return ids, mask
