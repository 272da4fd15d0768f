"""What a direction of the residual stream does to the next token by the direct path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import FeatureValue, TokenEffects
from neuronpedia_inference.engine.tree import Tree

NO_NORM = "TransformerLens does not say which module of this architecture is its final norm"
NO_DIRECTION = "its decoder row is zero"


@torch.no_grad()
def token_effects(tree: Tree, direction: Tensor, k: int) -> TokenEffects:
    """The k tokens that `direction` [d_model] promotes and suppresses most; k is cut to the vocabulary.

    The final norm and the unembedding are applied to the direction and to its opposite: half the difference is
    W_U (gain ⊙ d / |d|) for RMS norms; for LayerNorm the direction loses its mean and is of unit length without it.
    Biases cancel, and the scale of the stream is left out.
    """
    head: Any = tree.model.get_output_embeddings()
    norm: Any = tree.final_norm
    if norm is None:
        return TokenEffects(off_because=NO_NORM)
    length = float(direction.norm())
    if length == 0:
        return TokenEffects(off_because=NO_DIRECTION)
    # Of the length that a norm makes of everything, so that its epsilon does not count.
    size = direction.numel() ** 0.5
    unit = (direction / length * size).to(tree.model.device, head.weight.dtype)
    both = head(norm(torch.stack((unit, -unit))[None]))[0].float()
    logits = (both[0] - both[1]) / (2 * size)
    k = min(k, len(logits))
    return TokenEffects(_best(logits, k), _best(-logits, k, -1.0))


def _best(logits: Tensor, k: int, sign: float = 1.0) -> tuple[FeatureValue, ...]:
    values, ids = logits.topk(k)
    return tuple(FeatureValue(i, sign * value) for i, value in zip(ids.tolist(), values.tolist(), strict=True))
