"""The three steering formulas on tensors. Source: the wire contract, 3.3.

With c the coefficient, v the vector and v̂ = v/‖v‖ (norm in float32):

SIMPLE_ADDITIVE     h ← h + c·v
ORTHOGONAL_DECOMP   h ← h + (c − 1)(h·v̂)v̂
PROJECTION_CAP      h ← h + (min(h·v̂, c) − h·v̂)v̂
"""

from __future__ import annotations

from torch import Tensor

from neuronpedia_inference.steering.plan import SteerMethod


def unit(vector: Tensor) -> Tensor:
    """v/‖v‖ in float32; [width] -> [width]. The norm must not be zero."""
    wide = vector.float()
    return wide / wide.norm()


def steer(hidden: Tensor, vector: Tensor, coefficient: float, method: SteerMethod) -> Tensor:
    """[..., width] -> [..., width], in the dtype of `hidden`."""
    if method is SteerMethod.SIMPLE_ADDITIVE:
        return hidden + (coefficient * vector).to(hidden.dtype)
    direction = unit(vector).to(hidden.dtype)
    projection = (hidden * direction).sum(-1, keepdim=True)
    if method is SteerMethod.ORTHOGONAL_DECOMP:
        return hidden + (coefficient - 1) * projection * direction
    if method is SteerMethod.PROJECTION_CAP:
        return hidden + (projection.clamp(max=coefficient) - projection) * direction
    raise AssertionError(method)
