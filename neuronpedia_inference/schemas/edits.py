"""Edits of `POST /v1/steer`: what is done to a feature or along a vector, by how much, and where."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from neuronpedia_inference.edits.plan import OF_DIRECTIONS, OF_FEATURES, WITHOUT_AMOUNT, Do
from neuronpedia_inference.schemas.common import AtMost, Many, Name
from neuronpedia_inference.schemas.conditions import Condition
from neuronpedia_inference.schemas.vectors import Vector, VectorName
from neuronpedia_inference.schemas.words import A_FEATURE, FeatureName, problem, with_keywords

MAX_AMOUNT = 1e6
MAX_EDITS = 64
MAX_LISTED = 512
"""Positions or token ids of one selection."""
MAX_POSITION = 2**24
ABLATE = "ablate"
_IN_DOSES = (Do.ADD, Do.CLAMP, Do.AT_LEAST, Do.AT_MOST, Do.CAP, Do.FLOOR)
_OF_MAXIMA = (Do.ADD, Do.CLAMP, Do.AT_LEAST, Do.AT_MOST)

Count = Annotated[int, Field(ge=0, le=MAX_POSITION)]
AtLeastOne = Annotated[int, Field(ge=1, le=MAX_POSITION)]
Listed = Annotated[Many[Count], AtMost(MAX_LISTED), Field(min_length=1)]


_FROM = {"from": (Count, None, "The first count that is selected.")}


class Positions(with_keywords(_FROM)):
    """Positions for which all that is given holds. Counts begin at 0 in the prompt, and again at what is generated."""

    to: Count | None = Field(default=None, description="The first count that is not selected any more.")
    phase: Literal["prompt", "generated", "both"] = Field(
        default="both", description="Which part of the text; the prompt's first token is its position 0."
    )
    positions: Listed | None = Field(
        default=None, description="Places in the whole text, prompt and completion; 0 is the first token."
    )
    first: AtLeastOne | None = Field(default=None, description="So many from the beginning of each phase.")
    last: AtLeastOne | None = Field(
        default=None, description="So many at the end of the prompt; goes with `phase` `prompt`."
    )
    token_ids: Listed | None = Field(default=None, description="Only where the token is one of these.")

    @model_validator(mode="after")
    def _select_something(self) -> Self:
        begins, ends = getattr(self, "from"), self.to
        if begins is not None and ends is not None and begins >= ends:
            raise problem(f"from {begins} to {ends} selects nothing: `to` is the first that is not selected any more")
        if self.first is not None and begins is not None and begins >= self.first:
            raise problem(f"from {begins} and first {self.first} select nothing together")
        if self.last is not None and self.phase != "prompt":
            raise problem(
                'last counts back from the end of the prompt: add "phase": "prompt" (nobody knows where text ends)'
            )
        return self


_EXCEPT = {"except": (Positions, None, "Positions that are taken away from these.")}


class Selection(with_keywords(_EXCEPT, Positions)):
    """Where an edit acts."""

    ramp: Annotated[Many[Count], AtMost(2), Field(min_length=2)] | None = Field(
        default=None,
        description="[from, to]: the edit grows from nothing at the first count of a phase to its whole at the second; "
        "it fades where the second is smaller.",
    )

    @model_validator(mode="after")
    def _have_two_ends(self) -> Self:
        if self.ramp is not None and self.ramp[0] == self.ramp[1]:
            raise problem(f"ramp begins and ends at {self.ramp[0]}: give two counts, or `from`")
        return self


_WITH = {
    "with": (
        Annotated[Vector | FeatureName, Field(union_mode="left_to_right")],
        None,
        "Of `swap`: the feature, or the vector at the same hook, that gets what the other had.",
    )
}


class SteerEdit(with_keywords(_WITH)):
    """One edit, of a feature or of a vector with its hook."""

    do: Literal[
        "add",
        "clamp",
        "scale",
        "ablate",
        "at_least",
        "at_most",
        "swap",
        "orthogonal",
        "cap",
        "floor",
        "project_out",
    ] = Field(
        description="With a the feature's activation, or h·v̂ of a vector: `clamp` a ← c, `scale` a ← c·a, `ablate` "
        "a ← 0, `at_least` max(a, c), `at_most` min(a, c) for a feature; `orthogonal` c·a, `cap` min(a, c), `floor` "
        "max(a, c), `project_out` 0 for a vector; for both `add` h + c·v (of a feature, its decoder row) and `swap`, "
        "which gives a to another and leaves 0. The rest of h stays as it is."
    )
    feature: FeatureName | None = Field(default=None, description=A_FEATURE)
    vector: Vector | None = Field(default=None, description="A direction of your own, as wide as `hook`.")
    hook: Name | None = Field(default=None, description="Where a vector is read and written.")
    amount: Annotated[float, Field(ge=-MAX_AMOUNT, le=MAX_AMOUNT)] | None = Field(
        default=None, description="c; not for `ablate`, `project_out` and `swap`."
    )
    unit: Literal["absolute", "dose", "of_max"] = Field(
        default="absolute",
        description="What `amount` counts: the units that activations are told in; times the norm of what is there; "
        "or times the largest known activation of the feature. Begin with a dose of 0.3, or with 1.5 times the maximum "
        "by `clamp` (docs/steering.md).",
    )
    on: Selection | None = Field(
        default=None,
        description="Where it acts. Left out: everywhere, but for position 0 and special tokens where a feature is "
        "read or a dose is measured; a vector or an addition leaves out what `steer_special_tokens` says.",
    )
    when: Condition | None = Field(
        default=None, description="Acts only where this holds too, of the positions of `on`."
    )
    id: Annotated[str, Field(max_length=64)] | None = Field(default=None, description="A name of your own for it.")

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"do": "clamp", "feature": "15-res-4k/1113", "amount": 60}]}
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        do = Do.SCALE if self.do == ABLATE else Do(self.do)
        if (self.feature is None) == (self.vector is None):
            raise problem("give exactly one of feature and vector")
        if (self.vector is None) != (self.hook is None):
            raise problem("vector and hook go together; a feature brings its hook")
        allowed = OF_DIRECTIONS if self.feature is None else OF_FEATURES
        if do not in allowed:
            what = "a vector" if self.feature is None else "a feature"
            names = [one.value for one in allowed] + ([ABLATE] if self.feature is not None else [])
            raise problem(f"{self.do} is not for {what}: {', '.join(sorted(names))} are")
        self._fit_amount(do)
        self._fit_other(do)
        return self

    def _fit_amount(self, do: Do) -> None:
        needs_none = do in WITHOUT_AMOUNT or self.do == ABLATE
        if needs_none and (self.amount is not None or self.unit != "absolute"):
            raise problem(f"{self.do} takes no amount and no unit")
        if not needs_none and self.amount is None:
            raise problem(f"{self.do} needs an amount")
        in_unit = {"absolute": (do,), "dose": _IN_DOSES, "of_max": _OF_MAXIMA}[self.unit]
        if do not in in_unit:
            raise problem(f"the amount of {self.do} is a factor, or has no maximum to be counted in: unit is absolute")
        if self.unit == "of_max" and self.feature is None:
            raise problem("unit of_max is for features; a vector has no largest activation")

    def _fit_other(self, do: Do) -> None:
        other: Any = getattr(self, "with")
        if (do is Do.SWAP) != (other is not None):
            raise problem("with goes with swap, which needs it")
        if other is not None and isinstance(other, list | VectorName) != (self.vector is not None):
            raise problem("swap gives a feature's number to a feature, a vector's to a vector at the same hook")
