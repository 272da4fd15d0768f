"""A seeded temporal SAE, as SAELens and as its authors write it, and what it gives, position by position in float64.

With λ = 1 / (4 d_in), f the SAE's factor and W_enc its encoder (the decoder's transpose where they are tied), the rest
r of what is read begins as f·h − b_dec. Each attention layer turns z_t = relu(λ r_t W_enc) and the z of the position
before, which is zeros at position 0, into what it predicts (arXiv 2511.01836):

    q_t from z_t; k_s and v_s from z_{s−1};  p_t = relu(W_o Σ_{s ≤ t} softmax_s(q_t·k_s / √d) v_s + b_o), heads apart
    c_t = (p_t W_dec)·r_t / (‖p_t W_dec‖ + 1e-6)²;  predicted codes gain c_t p_t, and r_t loses c_t p_t W_dec

The novel codes are relu(λ r_t W_enc), of which the largest k stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

D_SAE, N_HEADS, BOTTLENECK, K, FACTOR = 48, 2, 4, 6, 0.7
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Temporal:
    """One of them."""

    d_in: int
    hook: str
    tied: bool = True
    n_layers: int = 1
    seed: int = 0

    @property
    def weights(self) -> dict[str, Tensor]:
        """By SAELens's names."""
        made = torch.Generator().manual_seed(self.seed)

        def drawn(*shape: int, scale: float) -> Tensor:
            return scale * torch.randn(shape, generator=made)

        n_keys = D_SAE // BOTTLENECK
        found = {"W_dec": drawn(D_SAE, self.d_in, scale=1.0), "b_dec": drawn(self.d_in, scale=0.3)}
        if not self.tied:
            found["W_enc"] = drawn(self.d_in, D_SAE, scale=1.0)
        for layer in range(self.n_layers):
            for name, n_rows in (("k_ctx", n_keys), ("q_target", n_keys), ("v_ctx", D_SAE), ("c_proj", D_SAE)):
                found[f"attn_layers.{layer}.{name}.weight"] = drawn(n_rows, D_SAE, scale=1.0)
                found[f"attn_layers.{layer}.{name}.bias"] = drawn(n_rows, scale=0.3)
        return found

    def module(self) -> Any:
        """SAELens's own."""
        from sae_lens import TemporalSAE, TemporalSAEConfig

        scaling: dict[str, Any] = {"normalize_activations": "constant_scalar_rescale"}
        config = TemporalSAEConfig(
            d_in=self.d_in,
            d_sae=D_SAE,
            n_heads=N_HEADS,
            n_attn_layers=self.n_layers,
            bottleneck_factor=BOTTLENECK,
            kval_topk=K,
            tied_weights=self.tied,
            **scaling,
            activation_normalization_factor=FACTOR,
            apply_b_dec_to_input=True,
        )
        config.metadata.hook_name = self.hook
        module = TemporalSAE(config)
        module.load_state_dict(self.weights)
        return module

    def write_original(self, folder: Path) -> None:
        """As its authors' repository has it."""
        about = {"n_heads": N_HEADS, "n_attn_layers": self.n_layers, "bottleneck_factor": BOTTLENECK, "kval_topk": K}
        about |= {"sae_diff_type": "topk", "tied_weights": self.tied, "scaling_factor": FACTOR}
        about |= {"exp_factor": D_SAE / self.d_in}
        config = {"llm": {"dimin": self.d_in}, "data": {"dtype": "float32"}, "sae": about}
        folder.mkdir(parents=True)
        (folder / "conf.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        theirs = {"W_dec": "D", "W_enc": "E", "b_dec": "b"}
        tensors = {theirs.get(name, name): tensor for name, tensor in self.weights.items()}
        save_file(tensors, folder / "latest_ckpt.safetensors")

    def codes(self, hidden: Tensor) -> tuple[Matrix, Matrix]:
        """[pos, d_in] -> the novel and the predicted ones, [pos, D_SAE] each."""
        w = {name: tensor.double().numpy() for name, tensor in self.weights.items()}
        encoder, decoder = w.get("W_enc", w["W_dec"].T), w["W_dec"]
        rest = FACTOR * hidden.double().numpy() - w["b_dec"]
        predicted = np.zeros((len(rest), D_SAE))
        for layer in range(self.n_layers):
            own = np.maximum(rest @ encoder / (4 * self.d_in), 0)
            before = np.vstack([np.zeros(D_SAE), own[:-1]])
            for place in range(len(rest)):
                code = np.maximum(_attended(w, f"attn_layers.{layer}.", own[place], before[: place + 1]), 0)
                there = code @ decoder
                share = there @ rest[place] / (np.linalg.norm(there) + 1e-6) ** 2
                predicted[place] += share * code
                rest[place] -= share * there
        novel = np.maximum(rest @ encoder / (4 * self.d_in), 0)
        least = np.sort(novel, axis=1)[:, -K, None]
        return np.where(novel >= least, novel, 0), predicted

    def similarity(self, hidden: Tensor) -> Matrix:
        """Of the predicted codes, position 0 left out: [pos − 1, pos − 1]."""
        predicted = self.codes(hidden)[1]
        centred = predicted - predicted.mean(axis=0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        return (unit @ unit.T)[1:, 1:]


def _attended(w: dict[str, Matrix], layer: str, own: Matrix, before: Matrix) -> Matrix:
    """[D_SAE], [seen, D_SAE] -> [D_SAE]"""

    def turned(name: str, rows: Matrix) -> Matrix:
        return rows @ w[f"{layer}{name}.weight"].T + w[f"{layer}{name}.bias"]

    query, keys, values = turned("q_target", own), turned("k_ctx", before), turned("v_ctx", before)
    heads = []
    for head in range(N_HEADS):
        of_keys = slice(head * len(query) // N_HEADS, (head + 1) * len(query) // N_HEADS)
        of_values = slice(head * D_SAE // N_HEADS, (head + 1) * D_SAE // N_HEADS)
        scores = keys[:, of_keys] @ query[of_keys] / np.sqrt(len(query) // N_HEADS)
        weights = np.exp(scores - scores.max())
        heads.append(weights @ values[:, of_values] / weights.sum())
    return turned("c_proj", np.concatenate(heads))
