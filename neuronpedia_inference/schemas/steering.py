"""What to steer with: one value, the same wherever a request may steer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from neuronpedia_inference.domain import MAX_STEERS
from neuronpedia_inference.schemas.common import AtMost, Many, Name, Ours, SourceName
from neuronpedia_inference.schemas.edits import MAX_EDITS, SteerEdit
from neuronpedia_inference.schemas.vectors import Vector

MAX_STRENGTH = 1e6
AtMostSteers = AtMost(MAX_STEERS)

NPSteerMethod = Literal["SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP"]
Method = Annotated[
    NPSteerMethod,
    Field(
        description="With c = strength multiplier × strength, state h and direction v (v̂ at unit length): "
        "SIMPLE_ADDITIVE h + c·v; ORTHOGONAL_DECOMP h + (c − 1)(h·v̂)v̂; "
        "PROJECTION_CAP h + (min(h·v̂, c) − h·v̂)v̂."
    ),
]
StrengthMultiplier = Annotated[
    float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH, description="Every strength is multiplied by this.")
]
Strength = Annotated[
    float,
    Field(
        ge=-MAX_STRENGTH,
        le=MAX_STRENGTH,
        description="How strongly; negative values steer away. Of features and "
        "unit vectors 0.3 of the norm of what passes is where to begin, and 0.6 where texts break (docs/steering.md).",
    ),
]


class SteerByFeature(Ours):
    """Steer with a feature."""

    source: SourceName | None = Field(
        default=None, description="Source of the feature; may be left out when only one is loaded."
    )
    index: int = Field(description="Index of the feature in its source.")
    strength: Strength


class SteerByVector(Ours):
    """Steer with a vector of your own."""

    hook: Name = Field(description='Where to steer, such as "blocks.15.hook_resid_post".')
    vector: Vector = Field(description="The direction, as wide as the hook.")
    strength: Strength


class MaxDose(Ours):
    """A bound on the dose of every edit: the norm of what it writes at a token, by the norm of what was there before
    the place's first edit."""

    value: Annotated[float, Field(gt=0, le=MAX_STRENGTH)] = Field(description="The largest dose.")
    then: Literal["warn", "clamp", "refuse"] = Field(
        default="warn",
        description="`warn`: the answer names the edits that wrote more, in `over_dose`. `clamp`: what an edit writes "
        "is made as much smaller as it takes. `refuse`: nothing runs where an edit may write more: at any state where "
        "that is known (doses, and factors along a direction), else at one of the place's typical norm "
        "(`typical_norms` of /v1/capabilities), with the feature at its largest known activation.",
    )


class Steering(Ours):
    """`features`, `vectors` and `edits` act in this order; without any of them the model is as it is."""

    features: Annotated[Many[SteerByFeature], AtMostSteers] | None = Field(
        default=None, description="Features to steer with, in order."
    )
    vectors: Annotated[Many[SteerByVector], AtMostSteers] | None = Field(
        default=None, description="Vectors to steer with, in order."
    )
    edits: Annotated[Many[SteerEdit], AtMost(MAX_EDITS)] | None = Field(
        default=None, description="Edits, in order, each with a method of its own."
    )
    method: Method = "SIMPLE_ADDITIVE"
    strength_multiplier: StrengthMultiplier = 1.0
    max_dose: MaxDose | None = Field(default=None, description="How much an edit may write at a token; null for any.")
