"""Steering as tables: what is done at one point to every row of a batch, in one formula.

With c the coefficient, v the vector, v̂ = v/‖v‖ (norm in float32) and p = h·v̂, the wire contract (3.3) has

SIMPLE_ADDITIVE     h ← h + c·v
ORTHOGONAL_DECOMP   h ← h + (c − 1)p·v̂
PROJECTION_CAP      h ← h + (min(p, c) − p)v̂

The last two are h ← h + (min(gain·p, cap) − p)v̂ with gain = c, cap = ∞ and with gain = 1, cap = c. A row that is not
steered has v = 0: it gets zeros added, whatever its neighbours get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from neuronpedia_inference.steering.plan import SteerMethod


class Steer(Protocol):
    """A vector with its strength; `engine.protocol.Steering` is one."""

    @property
    def vector(self) -> Tensor: ...

    @property
    def coefficient(self) -> float: ...

    @property
    def method(self) -> SteerMethod: ...


def unit(vector: Tensor) -> Tensor:
    """v/‖v‖ in float32; [width] -> [width]. The norm must not be zero."""
    wide = vector.float()
    return wide / wide.norm()


class SteerTable:
    """The steers of every row at one point."""

    def __init__(self, rows: Sequence[Sequence[Steer]]) -> None:
        """`rows`: the steers of each row in the order of its request; at least one row has one."""
        self._rounds = [_round(steers) for steers in zip_longest(*map(_merged, rows))]

    def __call__(self, hidden: Tensor, keep: Tensor | None = None) -> Tensor:
        """[row, pos, ...width] -> the same, steered, in the same dtype.

        `keep`: [row, pos] of bool, positions that stay as they are; None for none.
        """
        changed = hidden.flatten(2)
        for one in self._rounds:
            changed = changed + one(changed)
        if keep is not None:
            changed = torch.where(keep[..., None], hidden.flatten(2), changed)
        return changed.reshape(hidden.shape)


@dataclass(frozen=True)
class _Added:
    """SIMPLE_ADDITIVE."""

    amount: Tensor
    """[row, 1, width]"""

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.amount.to(hidden.dtype)


@dataclass(frozen=True)
class _Projected:
    """The other two."""

    direction: Tensor
    """[row, 1, width], zero for rows without"""
    gain: Tensor
    """[row, 1, 1]"""
    cap: Tensor
    """[row, 1, 1]"""

    def __call__(self, hidden: Tensor) -> Tensor:
        size = (hidden.float() * self.direction).sum(-1, keepdim=True)
        wanted = torch.minimum(self.gain * size, self.cap)
        return ((wanted - size) * self.direction).to(hidden.dtype)


@dataclass(frozen=True)
class _Both:
    """A round in which some rows are steered by one kind and some by the other."""

    added: _Added
    projected: _Projected

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.added(hidden) + self.projected(hidden)


@dataclass(frozen=True)
class _Sum:
    """Additive steers that follow each other, as one."""

    vector: Tensor
    coefficient: float = 1.0
    method: SteerMethod = SteerMethod.SIMPLE_ADDITIVE


def _merged(steers: Sequence[Steer]) -> list[Steer]:
    """The same steers with every run of additive ones summed: the sum does not depend on where they are."""
    merged: list[Steer] = []
    for steer in steers:
        if _adds(steer):
            amount = steer.coefficient * steer.vector.float()
            if merged and _adds(merged[-1]):
                amount = amount + merged.pop().vector
            merged.append(_Sum(amount))
        else:
            merged.append(steer)
    return merged


def _round(steers: Sequence[Steer | None]) -> _Added | _Projected | _Both:
    """At most one steer of every row, done to all rows at once."""
    adding = [steer if steer is not None and _adds(steer) else None for steer in steers]
    projecting = [steer if steer is not None and not _adds(steer) else None for steer in steers]
    if not any(projecting):
        return _Added(_stack([None if steer is None else steer.vector for steer in adding]))
    if not any(adding):
        return _projected(projecting)
    return _Both(_Added(_stack([None if steer is None else steer.vector for steer in adding])), _projected(projecting))


def _projected(steers: Sequence[Steer | None]) -> _Projected:
    directions = _stack([None if steer is None else unit(steer.vector) for steer in steers])
    gains, caps = zip(*map(_gain_and_cap, steers), strict=True)
    numbers = torch.tensor([gains, caps], dtype=torch.float32, device=directions.device)[..., None, None]
    return _Projected(directions, numbers[0], numbers[1])


def _gain_and_cap(steer: Steer | None) -> tuple[float, float]:
    if steer is None:
        return 1.0, math.inf
    if steer.method is SteerMethod.ORTHOGONAL_DECOMP:
        return steer.coefficient, math.inf
    assert steer.method is SteerMethod.PROJECTION_CAP, steer.method
    return 1.0, steer.coefficient


def _stack(vectors: Sequence[Tensor | None]) -> Tensor:
    """Vectors or None -> [row, 1, width], zeros for None."""
    like = next(vector for vector in vectors if vector is not None)
    return torch.stack([torch.zeros_like(like) if vector is None else vector for vector in vectors])[:, None]


def _adds(steer: Steer) -> bool:
    return steer.method is SteerMethod.SIMPLE_ADDITIVE
