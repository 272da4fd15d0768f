"""Held-out metrics of the committed SAE folders, through SAELens's own encode and decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .collect import capturing
from .scan import load_scan
from .text import CONTEXT, load

BATCH = 8


@dataclass(slots=True)
class Sums:
    """Running sums over the counted positions of one layer."""

    positions: int = 0
    excluded: int = 0
    active: float = 0.0
    norms: float = 0.0
    first_norms: list[float] = field(default_factory=list)
    error: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: float = 0.0
    fired: Tensor = field(default_factory=lambda: torch.zeros(0))
    cross_entropy: dict[str, float] = field(default_factory=lambda: {"clean": 0.0, "sae": 0.0, "zero": 0.0})
    predictions: int = 0

    def add(self, x: Tensor, acts: Tensor, rebuilt: Tensor) -> None:
        if self.positions == 0:
            self.total, self.fired = torch.zeros(x.shape[1]), torch.zeros(acts.shape[1])
        self.positions += len(x)
        self.active += (acts > 0).sum().item()
        self.norms += x.norm(dim=1).sum().item()
        self.error += (x - rebuilt).square().sum().item()
        self.total += x.sum(0)
        self.squares += x.square().sum().item()
        self.fired += (acts > 0).sum(0)


def held_out(work: Path) -> tuple[Tensor, np.ndarray]:
    """([context, 128] ids, [context] source names)."""
    parts = load(work).values()
    tokens = np.concatenate([part.tokens[part.held_out] for part in parts]).astype(np.int64)
    return torch.from_numpy(tokens), np.concatenate([part.source[part.held_out] for part in parts])


def counted(x: Tensor, sink_norm: float) -> Tensor:
    """[batch, pos, d_model] -> [batch, pos] bool: neither position 0 nor an attention sink."""
    mask = x.norm(dim=-1) <= sink_norm
    mask[:, 0] = False
    return mask


@torch.inference_mode()
def evaluate(work: Path, model: Any, saes: dict[int, Any]) -> dict[str, dict[str, float]]:
    """Source -> metrics on the held-out text; dead features are counted on the training text."""
    tokens, _ = held_out(work)
    sums = {layer: Sums() for layer in saes}
    for number, batch in enumerate(torch.split(tokens, BATCH)):
        with capturing(model, tuple(saes), stop=False) as captured:
            clean = _cross_entropy(model(input_ids=batch, use_cache=False).logits, batch)
        for layer, sae in saes.items():
            _measure(model, sae, layer, captured[layer], batch, sums[layer])
            sums[layer].cross_entropy["clean"] += clean
        if number % 8 == 7:
            print(f"evaluate: {(number + 1) * BATCH} of {len(tokens)} contexts", flush=True)
    return {f"{layer}-res-4k": summary(sums[layer], load_scan(work, layer).rate) for layer in saes}


def _measure(model: Any, sae: Any, layer: int, resid: Tensor, batch: Tensor, sums: Sums) -> None:
    """Add one batch: `resid` is the layer's residual stream, [batch, pos, d_model]."""
    mask = counted(resid, sae.cfg.metadata.sink_norm)
    x = resid[mask]
    acts = sae.encode(x)
    rebuilt = sae.decode(acts)
    sums.add(x, acts, rebuilt)
    sums.first_norms += resid[:, 0].norm(dim=1).tolist()
    sums.excluded += int((~mask).sum())
    sums.predictions += batch.shape[0] * (CONTEXT - 1)
    for name, replacement in (("sae", rebuilt), ("zero", torch.zeros_like(x))):
        replaced = resid.clone()
        replaced[mask] = replacement
        sums.cross_entropy[name] += _cross_entropy(logits_from(model, layer, replaced), batch)


def logits_from(model: Any, layer: int, resid: Tensor) -> Tensor:
    """Run the blocks after `layer` on `resid`, [batch, pos, d_model] -> [batch, pos, vocabulary]."""
    positions = torch.arange(resid.shape[1]).unsqueeze(0)
    rotary = model.model.rotary_emb(resid, positions)
    for block in model.model.layers[layer + 1 :]:
        resid = block(resid, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return model.lm_head(model.model.norm(resid))


def _cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    """Summed over next-token predictions, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()


def summary(sums: Sums, training_rate: np.ndarray) -> dict[str, float]:
    ce = {name: total / sums.predictions for name, total in sums.cross_entropy.items()}
    variance = sums.squares - sums.total.square().sum().item() / sums.positions
    return {
        "l0": round(sums.active / sums.positions, 2),
        "fvu": round(sums.error / variance, 4),
        "ce_clean": round(ce["clean"], 4),
        "ce_sae": round(ce["sae"], 4),
        "ce_zero": round(ce["zero"], 4),
        "ce_recovered": round((ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]), 4),
        "dead_share": round(float((training_rate == 0).mean()), 4),
        "silent_held_out_share": round((sums.fired == 0).float().mean().item(), 4),
        "dense_share": round(float((training_rate > 0.1).mean()), 4),
        "excluded_positions_share": round(sums.excluded / (sums.positions + sums.excluded), 5),
        "mean_norm": round(sums.norms / sums.positions, 1),
        "mean_norm_position_0": round(sum(sums.first_norms) / len(sums.first_norms), 1),
        "positions": sums.positions,
    }
