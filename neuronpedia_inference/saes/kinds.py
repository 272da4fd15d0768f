"""The kinds of SAE that are served, in SAELens's words, and the tensors that each has."""

from __future__ import annotations

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
    )
)
"""Those that encode each position by itself; `temporal` attends to earlier ones."""

BIASES = ("b_gate", "b_enc")
"""What is added to an encoder's product, of a gated SAE and of the others."""
SCALED_BY_NORMS = ("b_enc", "b_gate", "b_mag", "threshold")
"""Vectors that are multiplied by the decoder's norms where these are folded in."""
LEAST_NORM = 1e-8
"""Norms count as no less, or a row of zeros would be divided by zero."""


def shapes_of(kind: str, d_in: int, d_sae: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an SAE, by SAELens's name."""
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if kind == "matching_pursuit":  # its encoder is its decoder
        del shapes["W_enc"]
    elif kind == "gated":
        shapes |= {"b_gate": (d_sae,), "b_mag": (d_sae,), "r_mag": (d_sae,)}
    else:
        shapes["b_enc"] = (d_sae,)
    if "jumprelu" in kind:
        shapes["threshold"] = (d_sae,)
    if "skip" in kind:
        shapes["W_skip"] = (d_out, d_in)
    return shapes
