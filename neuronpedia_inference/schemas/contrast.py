"""Two sets of texts, and the features that separate them."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import (
    AtMost,
    Many,
    MaybeModelName,
    Ours,
    Reply,
    Reproducible,
    SourceSetName,
    examples,
)
from neuronpedia_inference.schemas.features import AnySource, FeatureName

MAX_TEXTS = 64
"""Of one set."""

Texts = Annotated[Many[str], Field(min_length=1), AtMost(MAX_TEXTS)]


class ContrastRequest(Ours):
    """Which features separate two sets of texts. A text counts by its mean activation, special tokens aside."""

    a: Texts = Field(description="1 to 64 texts that have something.")
    b: Texts = Field(description="1 to 64 texts that do not have it.")
    source: AnySource | None = Field(default=None, description="Source to look at; left out: all of the set.")
    source_set: SourceSetName | None = Field(
        default=None, description="Source set to look at; may be left out when only one is loaded."
    )
    limit: Annotated[int, Field(ge=1)] = Field(
        default=10, description="Features returned for each set at most. More than MAX_RESULTS are refused."
    )
    max_density: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1,
        description="Features that fire on a larger share of tokens are left out; where densities are unknown, those "
        "that fire on more than half of the tokens sent.",
    )
    reproducible: Reproducible = False
    model: MaybeModelName = None

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "a": ["The moon moves around the earth.", "The planet has two moons."],
                "b": ["The judge heard the case.", "The bread is baked at noon."],
                "source_set": "res-4k",
                "limit": 3,
            }
        )
    )


class SeparatingFeature(FeatureName):
    """A feature of which one set has more than the other."""

    effect_size: float = Field(
        description="Cohen's d of the texts' means, with a constant that keeps features that hardly fire from the top; "
        "above zero where `a` has more."
    )
    mean_a: float = Field(description="Mean over the texts of `a` of the mean activation over a text.")
    mean_b: float = Field(description="The same of `b`.")
    share_a: float = Field(description="Share of the texts of `a` on which it fires at all.")
    share_b: float = Field(description="The same of `b`.")
    density: float | None = Field(default=None, description="Share of tokens on which it fires; null if unknown.")
    alike: list[FeatureName] = Field(
        description="Weaker ones whose decoder rows point nearly the same way (a cosine of at least 0.7)."
    )


class ContrastResponse(Reply):
    """The features that separate the two sets."""

    a: list[SeparatingFeature] = Field(description="Those of which `a` has more, the largest effect first.")
    b: list[SeparatingFeature] = Field(description="Those of which `b` has more, the largest effect first.")
    n_dense: int = Field(description="Features that fire on some text and were left out as dense.")
