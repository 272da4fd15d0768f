"""What the residual stream says of the next token by the direct path: of a direction, and of what is behind a block.

The logit lens (nostalgebraist, 2020) is the final norm, the unembedding and what an architecture does to its logits,
applied behind any block. Nothing is believed of an architecture: behind the last block it must give the model's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import FeatureValue, TokenEffects
from neuronpedia_inference.engine.agreement import logits_agree
from neuronpedia_inference.engine.faults import trial_failure
from neuronpedia_inference.engine.hooks import edits
from neuronpedia_inference.engine.tree import Tree
from neuronpedia_inference.points import RESID_POST, Point

NO_NORM = "TransformerLens does not say which module of this architecture is its final norm"
NO_DIRECTION = "its decoder row is zero"
NOT_ITS_LOGITS = "its final norm and unembedding do not make its logits of what its last block gives"
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
"""What configurations call the number that logits are multiplied with, or divided by."""


@dataclass(frozen=True, eq=False)
class Readout:
    """What one model would say if it ended behind a block."""

    tree: Tree

    def __call__(self, resid: Tensor) -> Tensor:
        """[pos, d_model] -> logits [pos, vocab], float32, a tensor of its own"""
        norm: Any = self.tree.final_norm
        head: Any = self.tree.model.get_output_embeddings()
        # Not called, but their `forward`: hooks of the pass under way are not meant for what is only looked at.
        logits = head.forward(norm.forward(resid[None]))[0].float()
        for name in (*_FACTORS, *_DIVISORS):
            number = self._number(name)
            if number is not None:
                logits = logits.mul_(number) if name in _FACTORS else logits.div_(number)
        cap = self._number("final_logit_softcapping")
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _number(self, name: str) -> float | None:
        config: Any = self.tree.model.config
        value = getattr(config.get_text_config(), name, None)
        return float(value) if isinstance(value, int | float) and value else None


def why_not_read_out(tree: Tree, ids: Sequence[int]) -> str:
    """Empty if `Readout` gives this model's own logits behind its last block. Runs one pass."""
    if tree.final_norm is None:
        return NO_NORM
    seen: list[Tensor] = []
    agreed: list[bool] = []

    def compare() -> None:
        with edits(tree, [(Point(tree.n_layers - 1, RESID_POST), lambda hidden: seen.append(hidden.clone()))]):
            logits = tree.run(torch.tensor([list(ids)]), use_cache=False).logits[0]
        agreed.append(logits_agree(Readout(tree)(seen[0][0]), logits, tree.model.dtype))

    return "" if trial_failure("the logit lens", compare) is None and agreed == [True] else NOT_ITS_LOGITS


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
