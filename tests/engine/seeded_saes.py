"""Seeded random SAEs of every kind on the embedded model's residual stream, written as SAELens writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

D_MODEL = 576
D_SAE = 192
LAYERS = {"5-std": 5, "6-jump": 6, "7-topk": 7, "8-gated": 8, "9-btk": 9}


def write_all(folder: Path) -> None:
    """One folder per source name under `folder`."""
    for name in LAYERS:
        sae = build(name)
        if isinstance(sae, BatchTopKTrainingSAE):
            sae.save_inference_model(folder / name)
        else:
            sae.save_model(folder / name)


def build(name: str) -> Any:
    """The SAE with random weights of a size at which features fire on some tokens and not on others."""
    kind = name.split("-")[1]
    metadata = SAEMetadata(hook_name=f"blocks.{LAYERS[name]}.hook_resid_post", model_name="smollm2-135m-instruct")
    common: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "metadata": metadata}
    sae: Any = {
        "std": lambda: StandardSAE(StandardSAEConfig(**common)),
        "jump": lambda: JumpReLUSAE(JumpReLUSAEConfig(**common)),
        "topk": lambda: TopKSAE(TopKSAEConfig(k=9, **common)),
        "gated": lambda: GatedSAE(GatedSAEConfig(**common)),
        "btk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=9, **common)),
    }[kind]()
    generator = torch.Generator().manual_seed(LAYERS[name])
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.abs() * 20 if "threshold" in key else noise * (0.1 if key.startswith("r_") else 0.3))
        if kind == "btk":
            sae.topk_threshold.fill_(25.0)
    return sae.eval()
