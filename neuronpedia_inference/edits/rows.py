"""One row's edits, resolved: where, along what, how much, and what is read for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from neuronpedia_inference.edits.plan import Condition, Do, Fires, Step, step_of
from neuronpedia_inference.edits.select import EVERYTHING, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from neuronpedia_inference.points import Point


class Norm(IntEnum):
    """What an SAE's input is divided by, as SAELens names it."""

    NONE = 0
    CONSTANT = 1
    """constant_norm_rescale: to the length √width"""
    LAYER = 2
    """layer_norm: no mean, a deviation of 1"""


@dataclass(frozen=True, slots=True, eq=False)
class Gauge:
    """How one number is read from what passes: a = max(scale·q + bias, least)·[q + gate > threshold], q = e·x − shift.

    x is h, or h normalised. A direction is read as it is: a = q. ReLU has `least` 0, JumpReLU a threshold beside, and
    gated SAEs (Rajamanoharan et al., arXiv 2404.16014) a scale and a bias of their own for what passes the gate.
    """

    column: Tensor
    """e: [width], float32"""
    shift: float = 0.0
    """e·b_dec, where an SAE takes b_dec off its input."""
    scale: float = 1.0
    bias: float = 0.0
    gate: float = 0.0
    threshold: float = -math.inf
    least: float = -math.inf
    norm: Norm = Norm.NONE

    @property
    def is_direction(self) -> bool:
        """Whether it is read as it is: a = e·h."""
        numbers = (self.shift, self.scale, self.bias, self.gate, self.threshold, self.least, self.norm)
        return numbers == (0.0, 1.0, 0.0, 0.0, -math.inf, -math.inf, Norm.NONE)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureGauge:
    """The activation of a feature."""

    key: tuple[str, int]
    """Source and index: edits of one feature act on one number."""
    gauge: Gauge
    elsewhere: Point | None = None
    """Where a transcoder reads; None where it is read at the edit's own place."""


@dataclass(frozen=True, slots=True, eq=False)
class Trigger:
    """A feature whose firing is kept, position by position."""

    point: Point
    gauge: Gauge
    threshold: float
    is_below: bool
    on: Selection
    """Where it is looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """When an edit acts: a condition of a plan, with what is read for it."""

    condition: Condition
    triggers: Mapping[Fires, Trigger]


@dataclass(frozen=True, slots=True, eq=False)
class RowEdit:
    """One edit of one row."""

    point: Point
    """Where it writes."""
    vector: Tensor
    """[width] on the engine's device, float32: of a feature the decoder row."""
    amount: float
    do: Do
    is_dose: bool = False
    """Whether the amount is multiplied by the norm of what is at the point."""
    on: Selection = EVERYTHING
    when: Gate | None = None
    feature: FeatureGauge | None = None
    """Of edits that read one."""
    other: Tensor | None = None
    """What a swap gives to, as `vector`."""
    other_feature: FeatureGauge | None = None
    """Likewise, as `feature`."""
    most: float = math.inf
    """The largest dose that it writes at a position: the norm of its change by that of what is at the point. A larger
    change is made smaller."""

    @property
    def step(self) -> Step:
        return step_of(self.do, self.amount)

    @property
    def is_plain_addition(self) -> bool:
        """Whether it adds one vector, whatever passes and wherever that is."""
        is_even = self.on.is_everything and self.when is None
        return self.do is Do.ADD and not self.is_dose and is_even and not self.is_limited

    @property
    def reads(self) -> tuple[FeatureGauge | None, FeatureGauge | None]:
        """The features whose numbers it changes, if it is of features."""
        return self.feature, self.other_feature

    @property
    def is_limited(self) -> bool:
        return math.isfinite(self.most)

    @property
    def place(self) -> tuple[Selection, Gate | None]:
        """Edits of the same place act on the same positions."""
        return self.on, self.when
