"""When an edit acts: features that fire, and what is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from neuronpedia_inference.schemas.common import AtMost, Many
from neuronpedia_inference.schemas.words import A_FEATURE, FeatureName, problem, with_keywords

MAX_PARTS = 16
"""Features of one condition."""
MAX_DEPTH = 8
MAX_LASTING = 2**20
THIS_TOKEN = "this_token"
FROM_THEN_ON = "from_then_on"

_Number = Annotated[float, Field(ge=-1e6, le=1e6)]
_Lasting = Literal["this_token", "from_then_on"] | Annotated[int, Field(ge=1, le=MAX_LASTING)]
_Parts = Annotated[Many["Condition"], AtMost(MAX_PARTS), Field(min_length=1)]

_WORDS: dict[str, tuple[Any, Any, str]] = {
    "for": (
        _Lasting,
        THIS_TOKEN,
        "How long it holds once the feature has: for `this_token`, so many tokens from it on, or `from_then_on`.",
    ),
    "all": (_Parts, None, "Holds where all of these do."),
    "any": (_Parts, None, "Holds where one of these does."),
    "not": (Annotated["Condition", Field()], None, "Holds where this does not."),
}


class Condition(with_keywords(_WORDS)):
    """A feature that is above or below a number, or `all`, `any` or `not` of other conditions.

    A feature is read at every token but the first and special ones, before anything is edited there.
    """

    feature: FeatureName | None = Field(default=None, description=A_FEATURE)
    above: _Number | None = Field(default=None, description="Holds where the activation is larger.")
    below: _Number | None = Field(default=None, description="Holds where the activation is smaller.")

    @model_validator(mode="after")
    def _say_one_thing(self) -> Self:
        kinds = [name for name in ("feature", "all", "any", "not") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise problem("give exactly one of feature, all, any and not")
        has_bound = [name for name in ("above", "below") if getattr(self, name) is not None]
        if kinds == ["feature"] and len(has_bound) != 1:
            raise problem("a feature needs exactly one of above and below")
        if kinds != ["feature"] and (has_bound or "for" in self.model_fields_set):
            raise problem(f"above, below and for belong to a feature, not to {kinds[0]}")
        n_features, depth = _size(self)
        if n_features > MAX_PARTS or depth > MAX_DEPTH:
            raise problem(
                f"{n_features} features, {depth} deep, are too many for one condition: "
                f"the most is {MAX_PARTS}, {MAX_DEPTH} deep"
            )
        return self


def parts_of(condition: Condition) -> list[Condition]:
    """What `all`, `any` or `not` is made of; none of a feature."""
    negated = getattr(condition, "not")
    return [*(condition.all or ()), *(condition.any or ()), *([negated] if negated else [])]


def _size(condition: Condition) -> tuple[int, int]:
    """Features, and levels."""
    sizes = [_size(part) for part in parts_of(condition)]
    return (condition.feature is not None) + sum(n for n, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
