"""What a request wants steered, as plain numbers. Formulas: contract of the wire, `docs/reference.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class SteerMethod(StrEnum):
    SIMPLE_ADDITIVE = "SIMPLE_ADDITIVE"
    """h ← h + c·v"""
    ORTHOGONAL_DECOMP = "ORTHOGONAL_DECOMP"
    """h ← h + (c − 1)(h·v̂)v̂"""
    PROJECTION_CAP = "PROJECTION_CAP"
    """h ← h + (min(h·v̂, c) − h·v̂)v̂"""


@dataclass(frozen=True, slots=True)
class SteerFeature:
    """Steer with the unit-norm decoder row of a feature, at its SAE's hook."""

    source: str
    index: int
    coefficient: float
    """c = strength_multiplier × strength."""


@dataclass(frozen=True, slots=True)
class SteerVector:
    """Steer with a caller's own vector at a named hook."""

    hook: str
    vector: Sequence[float]
    coefficient: float


Steer = SteerFeature | SteerVector


@dataclass(frozen=True, slots=True)
class SteerPlan:
    """All steers of one row, applied in order."""

    steers: tuple[Steer, ...]
    method: SteerMethod = SteerMethod.SIMPLE_ADDITIVE
    normalize: bool = False
    """Divide every vector by its norm first."""
    skip_special_tokens: bool = False
    """Leave the prompt's special tokens untouched; generated positions are always steered."""

    @property
    def n_numbers(self) -> int:
        """Of all vectors that came with the request."""
        return sum(len(steer.vector) for steer in self.steers if isinstance(steer, SteerVector))
