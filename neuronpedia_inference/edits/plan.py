"""What a request wants edited, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.edits.select import Selection


class Do(StrEnum):
    """What is done to a number a: of a direction v, a = h·v̂; of a feature, its activation. c is the amount."""

    ADD = "add"
    """h ← h + c·v; nothing is read. Of a feature, v is its decoder row."""
    ORTHOGONAL = "orthogonal"
    """a ← c·a"""
    CAP = "cap"
    """a ← min(a, c)"""
    FLOOR = "floor"
    """a ← max(a, c)"""
    PROJECT_OUT = "project_out"
    """a ← 0"""
    CLAMP = "clamp"
    """a ← c"""
    SCALE = "scale"
    """a ← c·a"""
    AT_LEAST = "at_least"
    """a ← max(a, c)"""
    AT_MOST = "at_most"
    """a ← min(a, c)"""
    SWAP = "swap"
    """b ← b + a, then a ← 0; b is the number of another."""


BY_METHOD = {"SIMPLE_ADDITIVE": Do.ADD, "ORTHOGONAL_DECOMP": Do.ORTHOGONAL, "PROJECTION_CAP": Do.CAP}
"""The wire's methods (its contract, 3.3)."""
OF_FEATURES = frozenset((Do.CLAMP, Do.SCALE, Do.AT_LEAST, Do.AT_MOST, Do.SWAP, Do.ADD))
OF_DIRECTIONS = frozenset((Do.ADD, Do.ORTHOGONAL, Do.CAP, Do.FLOOR, Do.PROJECT_OUT, Do.SWAP))
WITHOUT_AMOUNT = frozenset((Do.PROJECT_OUT, Do.SWAP))


N_TOLD = 5
"""Numbers that are told of an edit at a position: share, before, target, after and dose."""


class Step(NamedTuple):
    """a ← clip(alpha·a + beta, lo, hi)"""

    alpha: float = 1.0
    beta: float = 0.0
    lo: float = -math.inf
    hi: float = math.inf


STAYS = Step()


def step_of(do: Do, amount: float) -> Step:
    """What becomes of the number that is read; of `add`, which reads none, what becomes of 0."""
    if do in (Do.ADD, Do.CLAMP):
        return Step(alpha=0.0, beta=amount)
    if do in (Do.ORTHOGONAL, Do.SCALE):
        return Step(alpha=amount)
    if do in (Do.CAP, Do.AT_MOST):
        return Step(hi=amount)
    if do in (Do.FLOOR, Do.AT_LEAST):
        return Step(lo=amount)
    return Step(alpha=0.0)


class Unit(StrEnum):
    ABSOLUTE = "absolute"
    DOSE = "dose"
    """Times the norm of what is at that place; directions have unit length."""
    OF_MAX = "of_max"
    """Times the largest activation that is known of the feature."""


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature of an SAE or a transcoder."""

    source: str
    index: int


@dataclass(frozen=True, slots=True)
class Direction:
    """A caller's own vector at a named hook."""

    hook: str
    vector: Sequence[float] | Numbers


Target = Feature | Direction


@dataclass(frozen=True, slots=True)
class Fires:
    """That a feature is above, or below, a number."""

    feature: Feature
    threshold: float
    is_below: bool = False
    n_tokens: int | None = 1
    """How long that holds: for this token and those that follow it, so many in all; None: from then on."""


@dataclass(frozen=True, slots=True)
class Both:
    """That all of these hold."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """That one of these holds."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """That this does not hold."""

    part: Condition


Condition = Fires | Both | Either | Not


def fires_in(condition: Condition) -> list[Fires]:
    """What a condition looks at."""
    if isinstance(condition, Fires):
        return [condition]
    parts = (condition.part,) if isinstance(condition, Not) else condition.parts
    return [fires for part in parts for fires in fires_in(part)]


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit."""

    do: Do
    target: Target
    amount: float = 0.0
    unit: Unit = Unit.ABSOLUTE
    other: Target | None = None
    """What a swap gives to."""
    on: Selection | None = None
    """None: everything, but where what is read or measured means nothing (position 0 and special tokens)."""
    when: Condition | None = None
    normalize: bool = False
    """Of `add`: divide the vector by its norm first."""
    name: str = field(default="", compare=False)
    """The caller's own for it."""
    field: str = field(default="", compare=False)
    """Where it stands in the request, for messages."""

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.target,) if self.other is None else (self.target, self.other)

    @property
    def reads_feature(self) -> bool:
        return isinstance(self.target, Feature) and self.do is not Do.ADD

    @property
    def needs_direction(self) -> bool:
        """Whether a vector of zeros means nothing."""
        return self.do is not Do.ADD or self.normalize or self.unit is Unit.DOSE


class Then(StrEnum):
    """What is done about a dose that is too large."""

    WARN = "warn"
    """The answer says so."""
    CLAMP = "clamp"
    """The change is made smaller."""
    REFUSE = "refuse"
    """Nothing runs, if it may become so large."""


@dataclass(frozen=True, slots=True)
class MaxDose:
    """A bound on what each edit writes at a position: its norm, by that of what is there."""

    value: float
    then: Then


@dataclass(frozen=True, slots=True)
class Plan:
    """All edits of one row, in order."""

    edits: tuple[Edit, ...]
    skip_special_tokens: bool = False
    """Edits of everything leave the prompt's special tokens untouched."""
    max_dose: MaxDose | None = None

    @property
    def warns(self) -> bool:
        """Whether the answer says which doses were too large."""
        return self.max_dose is not None and self.max_dose.then is Then.WARN

    @property
    def n_numbers(self) -> int:
        """Of all vectors that came with the request."""
        targets = (target for edit in self.edits for target in edit.targets)
        return sum(len(target.vector) for target in targets if isinstance(target, Direction))
