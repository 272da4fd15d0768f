"""SAEs of one set of seeded weights as each trainer lays them out, and what they mean by formulas written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, N_POS = 16, 48, 9
Write = Callable[[Path], None]


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ENC = _drawn(D_IN, D_SAE, seed=3)
"""[width, feature]; the decoder is [feature, width], with rows of different norms."""
DEC = _drawn(D_SAE, D_IN, seed=4) * (0.3 + torch.rand(D_SAE, 1, generator=torch.Generator().manual_seed(8)))
B_ENC, B_DEC = _drawn(D_SAE, seed=5), 0.2 + _drawn(D_IN, seed=6)
THRESHOLD = 0.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(4))
R_MAG, SKIP = 0.3 * _drawn(D_SAE, seed=7), _drawn(D_IN, D_IN, seed=9)
X = 0.3 + 2 * _drawn(N_POS, D_IN, seed=10)
NORMS = DEC.norm(dim=1)
CENTRED = X - X.mean(dim=1, keepdim=True)
LAYER_NORMED = CENTRED / (CENTRED.std(dim=1, keepdim=True) + 1e-5)
OURS = {"W_enc": ENC, "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC}
LINEAR = {
    "encoder.weight": ENC.T.contiguous(),
    "decoder.weight": DEC.T.contiguous(),
    "encoder.bias": B_ENC,
    "decoder.bias": B_DEC,
}
ENCODER_ALONE = {name: tensor for name, tensor in LINEAR.items() if name != "decoder.bias"}

# What they answer: [pos, feature], times the decoder norms that folding moves; TopK is not folded.


def relu(x: Tensor) -> Tensor:
    return (x @ ENC + B_ENC).relu() * NORMS


def jumprelu(x: Tensor, threshold: Tensor) -> Tensor:
    before = x @ ENC + B_ENC
    return torch.where(before > threshold, before.relu(), 0.0) * NORMS


def scaled(threshold: Tensor, factor: float) -> Tensor:
    """The factor is folded into W_enc and taken out of W_dec again, whose norms are folded afterwards."""
    return jumprelu(factor * X, threshold) / factor


def gated(x: Tensor) -> Tensor:
    return torch.where(x @ ENC + THRESHOLD > 0, (x @ ENC * R_MAG.exp() + B_ENC).relu(), 0.0) * NORMS


def topk(x: Tensor, k: int) -> Tensor:
    before = x @ ENC + B_ENC
    return torch.where(before >= before.topk(k, dim=1).values[:, -1:], before.relu(), 0.0)


# How they are written


def put(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def told(file: Path, config: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))


def pickled(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, file)


def gemma_2(folder: Path) -> None:
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in (OURS | {"threshold": THRESHOLD}).items()}
    np.savez(folder / "params.npz", **arrays)


def gemma_3(folder: Path) -> None:
    """No config.json: Google's folders have one, SAELens can do without."""
    put(folder / "params.safetensors", {name.lower(): t for name, t in OURS.items()} | {"threshold": THRESHOLD})


def gemma_3_affine(folder: Path) -> None:
    """With Google's config.json, which alone says that there is a skip connection."""
    told(folder / "config.json", {"architecture": "jump_relu", "model_name": "gemma-v3-4b", "affine_connection": True})
    more = {"threshold": THRESHOLD, "affine_skip_connection": SKIP}
    put(folder / "params.safetensors", {name.lower(): t for name, t in OURS.items()} | more)


def llama_scope(folder: Path) -> None:
    config = {"d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": 0.7, "hook_point_in": "blocks.3.hook_resid_post"}
    told(folder / "hyperparams.json", {**config, "dataset_average_activation_norm": {"in": 8.0}})
    put(folder / "checkpoints" / "final.safetensors", LINEAR)


def llama_scope_distilled(folder: Path) -> None:
    config = {"d_model": D_IN, "expansion_factor": D_SAE // D_IN, "hook_point_in": "blocks.3.hook_resid_post"}
    told(folder / "config.json", config)
    put(folder / "sae_weights.safetensors", {**LINEAR, "log_jumprelu_threshold": THRESHOLD.log()})


def mwhanna(file: Path) -> None:
    put(file, {**OURS, "W_enc": ENC.T.contiguous()})
    sizes = {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 64}}
    told(file.parent / "wandb-config.yaml", sizes)
    told(file.parent / "config.yaml", {"model_name": "Qwen/Qwen3-4B"})


def qwen_scope(file: Path) -> None:
    rows = 32 * 1024  # the repository's name says how many features there are
    grown = {"W_enc": torch.zeros(rows, D_IN), "W_dec": torch.zeros(D_IN, rows), "b_enc": torch.full((rows,), -9.0)}
    grown["W_enc"][:D_SAE], grown["W_dec"][:, :D_SAE], grown["b_enc"][:D_SAE] = ENC.T, DEC.T, B_ENC
    pickled(file, {**grown, "b_dec": B_DEC})


def goodfire(file: Path) -> None:
    pickled(file, {name.replace(".", "_linear."): tensor for name, tensor in LINEAR.items()})


def deepseek_r1(file: Path) -> None:
    pickled(file, LINEAR)


def connor_rob(file: Path) -> None:
    pickled(file, OURS)
    config = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.3.attn.hook_z"}
    told(file.with_name(f"{file.stem}_cfg.json"), config)


def before_saelens_6(**said: Any) -> Write:
    """A flat configuration; the tensors are named as today."""

    def write(folder: Path) -> None:
        config = {"model_name": "gpt2-small", "hook_point_head_index": None, "d_in": D_IN, "d_sae": D_SAE}
        told(folder / "cfg.json", {**config, "device": "mps", "dtype": "torch.float32", "context_size": 64, **said})
        more = {"threshold": THRESHOLD} if said.get("architecture") == "jumprelu" else {}
        put(folder / "sae_weights.safetensors", OURS | more)

    return write


def dictionary(kind: str, tensors: dict[str, Tensor], **said: Any) -> Write:
    def write(folder: Path) -> None:
        about = {"layer": 3, "dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "k": 5, "lm_name": "a/b"}
        told(folder / "config.json", {"trainer": {**about, **said}, "buffer": {"ctx_len": 64}})
        pickled(folder / "ae.pt", tensors)

    return write


BATCH_TOPK = {**ENCODER_ALONE, "b_dec": B_DEC, "k": torch.tensor(5), "threshold": torch.tensor(0.7)}
DICTIONARIES: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "AutoEncoder": ({**ENCODER_ALONE, "bias": B_DEC}, relu(X - B_DEC)),
    "AutoEncoderNew": (LINEAR, relu(X)),
    "AutoEncoderTopK": (BATCH_TOPK, topk(X - B_DEC, 5)),
    "BatchTopKSAE": (BATCH_TOPK, jumprelu(X - B_DEC, torch.tensor(0.7))),
    "MatryoshkaBatchTopKSAE": (
        {**OURS, "k": torch.tensor(5), "group_sizes": torch.tensor([16, 32]), "threshold": torch.tensor(0.7)},
        jumprelu(X - B_DEC, torch.tensor(0.7)),
    ),
    "JumpReluAutoEncoder": ({**OURS, "threshold": THRESHOLD}, jumprelu(X, THRESHOLD)),
    "GatedAutoEncoder": (
        {
            "encoder.weight": ENC.T.contiguous(),
            "decoder.weight": DEC.T.contiguous(),
            "decoder_bias": B_DEC,
            "r_mag": R_MAG,
            "gate_bias": THRESHOLD,
            "mag_bias": B_ENC,
        },
        gated(X - B_DEC),
    ),
}
"""By class: tensors, and what they answer."""


def sparsify(**said: Any) -> Write:
    def write(folder: Path) -> None:
        config = {"d_in": D_IN, "num_latents": D_SAE, "expansion_factor": 32, "k": 5, "normalize_decoder": True}
        told(folder / "cfg.json", {**config, "activation": "topk", **said})
        tensors = {"encoder.weight": ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": DEC, "b_dec": B_DEC}
        put(folder / "sae.safetensors", tensors)

    return write
