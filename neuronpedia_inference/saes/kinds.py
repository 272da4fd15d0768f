"""The kinds of SAE that are served, in SAELens's words, and the tensors that each has."""

from __future__ import annotations

from typing import Any

from neuronpedia_inference.domain import TEMPORAL

SERVED = frozenset(
    (
        "standard",
        "gated",
        "topk",
        "abstopk",
        "jumprelu",
        "matching_pursuit",
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
        TEMPORAL,
    )
)
"""All but `temporal` encode each position by itself."""
ATTENTION = "attn_layers."
"""What the names of a temporal SAE's attention begin with."""

BIASES = ("b_gate", "b_enc")
"""What is added to an encoder's product, of a gated SAE and of the others."""
SCALED_BY_NORMS = ("b_enc", "b_gate", "b_mag", "threshold")
"""Vectors that are multiplied by the decoder's norms where these are folded in."""
LEAST_NORM = 1e-8
"""Norms count as no less, or a row of zeros would be divided by zero."""


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an SAE, by SAELens's name. config: with SAELens's names."""
    kind, d_in, d_sae = config.architecture(), config.d_in, config.d_sae
    d_out = getattr(config, "d_out", d_in)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if kind == "matching_pursuit" or (kind == TEMPORAL and config.tied_weights):  # its encoder is its decoder
        del shapes["W_enc"]
    if kind == "matching_pursuit":
        return shapes
    if kind == TEMPORAL:
        return shapes | _attention_shapes(d_sae, d_sae // config.bottleneck_factor, config.n_attn_layers)
    if kind == "gated":
        shapes |= {"b_gate": (d_sae,), "b_mag": (d_sae,), "r_mag": (d_sae,)}
    else:
        shapes["b_enc"] = (d_sae,)
    if "jumprelu" in kind:
        shapes["threshold"] = (d_sae,)
    if "skip" in kind:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def _attention_shapes(d_sae: int, d_key: int, n_layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(n_layers):
        for name, n_rows in (("k_ctx", d_key), ("q_target", d_key), ("v_ctx", d_sae), ("c_proj", d_sae)):
            shapes[f"{ATTENTION}{layer}.{name}.weight"] = (n_rows, d_sae)
            shapes[f"{ATTENTION}{layer}.{name}.bias"] = (n_rows,)
    return shapes
