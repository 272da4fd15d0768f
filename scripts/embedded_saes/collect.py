"""Residual-stream activations of the three layers, from one forward pass that stops after the last one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .text import CONTEXT, load

LAYERS = (10, 15, 20)
D_MODEL = 576
BATCH = 16
FLOAT16_MAX = 65504.0


class _Stop(Exception):
    """Ends the forward pass after the last layer that is needed."""


@contextmanager
def capturing(model: Any, layers: tuple[int, ...], stop: bool = True) -> Iterator[dict[int, Tensor]]:
    """Each forward fills the yielded dict: layer -> residual stream after it, [batch, pos, d_model]."""
    captured: dict[int, Tensor] = {}
    last = max(layers)

    def hook(layer: int):
        def store(_module: Any, _args: Any, output: Any) -> None:
            captured[layer] = output[0] if isinstance(output, tuple) else output
            if stop and layer == last:
                raise _Stop

        return store

    handles = [model.model.layers[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def residuals(model: Any, tokens: Tensor, layers: tuple[int, ...] = LAYERS) -> dict[int, Tensor]:
    """[batch, pos] ids -> layer -> [batch, pos, d_model]; the blocks after the last layer do not run."""
    with capturing(model, layers) as captured, suppress(_Stop):
        model.model(input_ids=tokens, use_cache=False)
    return captured


def collect(work: Path, model: Any, parts: tuple[str, ...] = ()) -> None:
    """Write `acts/PART-LAYER.npy`, [context * 128, d_model] float16, for each part (all by default).

    It goes on where it stopped, and several processes may share the parts.
    """
    folder = work / "acts"
    folder.mkdir(parents=True, exist_ok=True)
    for part, contexts in load(work).items():
        if parts and part not in parts:
            continue
        rows = len(contexts.tokens) * CONTEXT
        files = {layer: _open(folder / f"{part}-{layer}.npy", rows) for layer in LAYERS}
        progress = folder / f"{part}-progress.json"
        start = json.loads(progress.read_text())["contexts"] if progress.exists() else 0
        began = time.monotonic()
        for at in range(start, len(contexts.tokens), BATCH):
            batch = torch.from_numpy(contexts.tokens[at : at + BATCH].astype(np.int64))
            for layer, values in residuals(model, batch).items():
                flat = values.reshape(-1, D_MODEL).clamp(-FLOAT16_MAX, FLOAT16_MAX)
                files[layer][at * CONTEXT : at * CONTEXT + len(flat)] = flat.half().numpy()
            if at // BATCH % 8 == 7:
                progress.write_text(json.dumps({"contexts": at + len(batch)}))
                rate = (at + len(batch) - start) * CONTEXT / (time.monotonic() - began)
                print(
                    f"{part}: {at + len(batch)}/{len(contexts.tokens)} contexts, {rate:.0f} tokens/s",
                    flush=True,
                )
        for file in files.values():
            file.flush()
        progress.write_text(json.dumps({"contexts": len(contexts.tokens)}))


def _open(path: Path, rows: int) -> np.memmap:
    mode = "r+" if path.exists() else "w+"
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=(rows, D_MODEL))
