"""One pass of each exported SAE over its training activations: how often and where every feature fires."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .train import training_activations

TOP = 64
CHUNK = 8192
CHUNKS_BETWEEN_CUTS = 12


@dataclass(frozen=True, slots=True)
class Scan:
    """`rate` [d_sae] is the share of positions on which a feature fires.

    `row` [d_sae, 64] are its strongest positions, best first, as rows of the joined text, -1 where there are
    fewer; `value` [d_sae, 64] the activations there.
    """

    rate: np.ndarray
    row: np.ndarray
    value: np.ndarray


def load_scan(work: Path, layer: int) -> Scan:
    with np.load(work / "scan" / f"{layer}.npz") as stored:
        return Scan(stored["rate"], stored["row"], stored["value"])


@torch.inference_mode()
def scan(work: Path, layer: int, sae: Any) -> None:
    """Write `scan/LAYER.npz`."""
    data = training_activations(work, layer)
    fired = np.zeros(sae.cfg.d_sae, dtype=np.int64)
    best = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    for number, at in enumerate(range(0, len(data.rows), CHUNK)):
        rows = data.rows[at : at + CHUNK]
        acts = sae.encode(torch.from_numpy(data.values[rows].astype(np.float32))).numpy()
        position, feature = acts.nonzero()
        fired += np.bincount(feature, minlength=len(fired))
        new = (feature, rows[position], acts[position, feature])
        best = tuple(np.concatenate(pair) for pair in zip(best, new, strict=True))
        if number % CHUNKS_BETWEEN_CUTS == CHUNKS_BETWEEN_CUTS - 1:
            best = _cut(*best)
    feature, row, value = _cut(*best)
    place = np.arange(len(feature)) - np.searchsorted(feature, feature)
    rows, values = np.full((len(fired), TOP), -1, np.int64), np.zeros((len(fired), TOP), np.float32)
    rows[feature, place], values[feature, place] = row, value
    (work / "scan").mkdir(exist_ok=True)
    np.savez(work / "scan" / f"{layer}.npz", rate=fired / len(data.rows), row=rows, value=values)
    print(f"scan: layer {layer}, {(fired == 0).sum()} features never fire", flush=True)


def _cut(feature: np.ndarray, row: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The strongest 64 of each feature, ordered by feature, then by falling value."""
    order = np.lexsort((row, -value, feature))
    feature, row, value = feature[order], row[order], value[order]
    keep = np.arange(len(feature)) - np.searchsorted(feature, feature) < TOP
    return feature[keep], row[keep], value[keep]
