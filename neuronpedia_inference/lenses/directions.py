"""Directions of tokens in the residual stream: along which more of it says more of the token, by a lens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import Lens
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.lenses.jacobians import Jacobians

LEAST_NORM = 1e-6
"""Of a sum of unit vectors: below it they cancel out."""


def direction_of(head: Any, jacobians: Jacobians, tokens: Sequence[tuple[int, Lens]], layer: int) -> Tensor:
    """The sum of the tokens' directions of unit length behind a block, [d_model] in float32.

    A token's direction is its row w of the unembedding, or Jᵀw where its lens has a Jacobian of the block
    (contract 4.5). Raises InvalidRequest where they cancel out.
    """
    rows = head.weight[[token_id for token_id, _ in tokens]].float()
    units: list[Tensor] = []
    for row, (_, lens) in zip(rows, tokens, strict=True):
        jacobian = jacobians.by_layer.get(layer) if lens is Lens.JACOBIAN else None
        direction = row if jacobian is None else jacobian.float().T @ row
        units.append(direction / direction.norm())
    found = torch.stack(units).sum(0)
    if not float(found.norm()) > LEAST_NORM:
        raise InvalidRequest("steer_tokens: the directions of these tokens cancel each other out. Name fewer of them.")
    return found
