"""Trained weights -> calibrated thresholds -> a folder that SAELens loads."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .collect import D_MODEL
from .text import CONTEXT
from .train import D_SAE, Recipe, training_activations

MODEL = "smollm2-135m-instruct"
SET = "res-4k"
CALIBRATION_TOKENS = 100_000
CHUNK = 4096


@torch.no_grad()
def export(work: Path, layer: int, recipe: Recipe, target: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`; matrices in bfloat16, biases and thresholds in fp32."""
    with np.load(work / "trained" / f"{layer}.npz") as stored:
        trained = {name: torch.from_numpy(stored[name]) for name in stored.files}
    state = {
        "W_enc": trained["w_enc"].T.contiguous().bfloat16(),
        "b_enc": trained["b_enc"],
        "W_dec": trained["w_dec"].bfloat16(),
        "b_dec": trained["b_dec"],
    }
    threshold = calibrate(work, layer, state, recipe)
    state["threshold"] = torch.full((D_SAE,), threshold)
    target.mkdir(parents=True, exist_ok=True)
    weights = target / "sae_weights.safetensors"
    save_file(state, weights)
    weights.chmod(0o644)
    text = json.dumps(config(layer, recipe, float(trained["sink_norm"])), indent=1)
    (target / "cfg.json").write_text(text + "\n", encoding="utf-8")
    print(f"layer {layer}: threshold {threshold:.3f}", flush=True)


def calibrate(work: Path, layer: int, state: dict[str, Tensor], recipe: Recipe) -> float:
    """The threshold at which training positions have `k` active features on average, with stored weights."""
    data = training_activations(work, layer)
    rows = np.random.default_rng(recipe.seed).choice(data.rows, CALIBRATION_TOKENS, replace=False)
    w_enc, floor, found = state["W_enc"].float(), 0.0, []
    for at in range(0, len(rows), CHUNK):
        x = torch.from_numpy(data.values[np.sort(rows[at : at + CHUNK])].astype(np.float32))
        pre = (x - state["b_dec"]) @ w_enc + state["b_enc"]
        if at == 0:
            # Half the first chunk's own threshold: well below the answer, and few enough values to keep.
            floor = 0.5 * torch.topk(pre.flatten(), recipe.k * len(x)).values[-1].item()
        found.append(pre[pre > floor])
    values = torch.cat(found)
    return torch.kthvalue(values, len(values) - recipe.k * len(rows)).values.item()


def config(layer: int, recipe: Recipe, sink_norm: float) -> dict[str, object]:
    """SAELens's configuration of an inference SAE."""
    return {
        "architecture": "jumprelu",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": MODEL,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "neuronpedia_id": f"{MODEL}/{layer}-{SET}",
            "context_size": CONTEXT,
            "prepend_bos": True,
            "excluded_positions": f"position 0, and norms above {sink_norm:.1f}",
            "sink_norm": round(sink_norm, 1),
            "training_k": recipe.k,
            # Without its version SAELens takes the file for an old one and drops the metadata.
            "sae_lens_version": version("sae-lens"),
        },
    }
