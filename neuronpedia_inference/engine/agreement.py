"""When two ways to the same numbers agree, up to the rounding of the precision at hand."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_DEEP_TOLERANCE = {torch.float32: 1e-3}
_ROUNDINGS = 8
"""Of the numbers that a difference was made from."""


def agree(found: Tensor, expected: Tensor, *beside: Tensor) -> bool:
    """Whether every vector (last axis) of one is the other's.

    Vectors that were made as differences of larger ones, `beside`, have the rounding of those. What is not finite
    agrees with nothing: beside infinity every error would be small.
    """
    if not all(bool(one.isfinite().all()) for one in (found, expected, *beside)):
        return False
    dtype = expected.dtype if not beside else beside[0].dtype
    allowed = _TOLERANCE.get(dtype, 5e-2) * _norm(expected)
    for other in beside:
        allowed = allowed + _ROUNDINGS * torch.finfo(dtype).eps * _norm(other)
    return found.shape == expected.shape and bool((_norm(found.float() - expected.float()) <= allowed).all())


def overflow(dtype: torch.dtype, *found: Tensor) -> str:
    """A reason, where what was found is not finite; else empty. dtype: the model's."""
    if all(bool(one.isfinite().all()) for one in found):
        return ""
    return f"{str(dtype).removeprefix('torch.')} overflows: what the model gives there is not finite"


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to what is expected; over all vectors."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def logits_agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """As `agree`, of what has gone through all layers. In 16 bits rounding grows so that only gross differences count.

    dtype: the model's.
    """
    difference = _norm(found.float() - expected.float())
    return bool((difference < _DEEP_TOLERANCE.get(dtype, 0.2) * _norm(expected).clamp(min=1e-6)).all())


def _norm(vectors: Tensor) -> Tensor:
    return vectors.float().norm(dim=-1)
