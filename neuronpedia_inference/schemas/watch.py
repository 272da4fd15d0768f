"""What may be read while a text is generated, and how it is answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from neuronpedia_inference.schemas.common import AtMost, Many, Name, Ours, Reply, SourceName
from neuronpedia_inference.schemas.conditions import Condition
from neuronpedia_inference.schemas.words import problem
from neuronpedia_inference.watches.rules import MAX_BACK, MAX_TIMES

MAX_LAYERS = 512
"""Layers of one watch."""


class SteerWatch(Ours):
    """Something to read at every token: one feature (`index`) or the strongest (`top_k`) of a source, the vector at a
    `hook`, or a `lens`."""

    source: SourceName | None = Field(
        default=None, description="Source of the features; may be left out when only one is loaded."
    )
    index: int | None = Field(default=None, description="The activation of this feature.")
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="The strongest features, so many; the server's MAX_TOP_K is the most."
    )
    hook: Name | None = Field(
        default=None, description='The vector that passes there, such as "blocks.15.hook_resid_post".'
    )
    lens: Literal["LOGIT_LENS", "JACOBIAN_LENS"] | None = Field(
        default=None,
        description="LOGIT_LENS: what the model would say next if it ended behind a block: its final norm and "
        "unembedding, applied to the residual stream there. JACOBIAN_LENS: the same after what the blocks behind it do "
        "on average, by their mean Jacobian.",
    )
    layers: Annotated[Many[int], AtMost(MAX_LAYERS)] | None = Field(
        default=None,
        description="With `lens`: behind which blocks; null for all that it has. A Jacobian lens has those that it was "
        "fitted for, and the last.",
    )
    top_n: Annotated[int, Field(ge=1)] = Field(
        default=3, description="With `lens`: tokens per block; the server's MAX_TOP_K is the most."
    )


EDITS = "edits"


def _watch(value: Any) -> Any:
    if value == EDITS or isinstance(value, Mapping | SteerWatch):
        return value
    raise problem('a watch is an object with index, top_k, hook or lens, or "edits"')


AskedWatch = Annotated[
    Annotated[SteerWatch, Tag("object")] | Annotated[Literal["edits"], Tag("word")],
    Discriminator(lambda value: "word" if value == EDITS else "object"),
    BeforeValidator(_watch),
]


class SteerRule(Ours):
    """What happens at a generated token at which `when` holds. Of several rules that hold the first one acts."""

    when: Condition = Field(
        description="On what features are, before anything is edited, at the token and those before it."
    )
    do: Literal["stop", "retry"] = Field(
        default="stop",
        description="`stop`: the token is kept, and the last one. `retry`: the newest tokens are taken back, and "
        "others are drawn in their place: the first of them is not drawn there again.",
    )
    back: Annotated[int, Field(ge=1, le=MAX_BACK)] = Field(
        default=1,
        description="Of `retry`: how many tokens are taken back. So many are held back from the stream; those before "
        "them stay, also where a text has gone back to them.",
    )
    times: Annotated[int, Field(ge=1, le=MAX_TIMES)] = Field(
        default=1,
        description="Of `retry`: how often in a text. The next time the tokens are taken back too, and the text ends "
        "before them.",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        beside = sorted({"back", "times"} & self.model_fields_set)
        if self.do == "stop" and beside:
            raise problem(f"{' and '.join(beside)} of a rule go with do retry, which takes tokens back; this one stops")
        return self


class SteerStop(Reply):
    """Which rule ended a text, and where."""

    rule: int = Field(description="Place of the rule in the request's list.")
    position: int = Field(description="Place of the token in `tokens`.")
    token: str = Field(description="The token as text.")


class SteerEvent(Reply):
    """A rule has taken tokens of a text back."""

    rule: int = Field(description="Place of the rule in the request's list.")
    position: int = Field(
        description="Place in `tokens` of the first that was taken back: other tokens follow there, or the text ends."
    )
    n_refused: int = Field(description="How many tokens were taken back.")


class SteerOverDose(Reply):
    """An edit that wrote more than `max_dose`."""

    edit: str = Field(description='Which of the request, such as "edits.0" or "features.2".')
    id: str | None = Field(default=None, description="Its `id`, where it has one.")
    dose: float = Field(description="The largest that it wrote.")
    position: int = Field(description="The token where it did, counted from the first of the prompt.")


class WatchedFeature(Reply):
    """A feature that fires at a token."""

    index: int = Field(description="Index of the feature in its source.")
    value: float = Field(description="Its activation.")
    label: str | None = Field(default=None, description="What it is called, if it has been named.")


class NPLogprobTop(Reply):
    """A token that could have been chosen."""

    token: str = Field(description="The token as text.")
    logprob: float = Field(description="Natural logarithm of its probability.")


class WatchedLayer(Reply):
    """What the model would say next if it ended behind a block."""

    layer: int = Field(description="The block.")
    top: list[NPLogprobTop] = Field(description="The likeliest tokens, most likely first.")


Watched = float | list[WatchedFeature] | list[WatchedLayer] | list[float]


class WatchedEdit(Reply):
    """What one edit has found and done, a value for every token; null where it has not acted.

    The number of a feature is its activation, of a vector the projection of what is there on its direction.
    """

    edit: str = Field(description='Which of the request, such as "edits.0" or "features.2".')
    id: str | None = Field(default=None, description="Its `id`, where it has one.")
    share: list[float] = Field(
        description="How much it has acted, from 0 to 1: by its selection, with a ramp, and its condition."
    )
    before: list[float | None] | None = Field(
        default=None, description="The number that it has read. Null of `add`, which reads none."
    )
    target: list[float | None] | None = Field(
        default=None, description="What the number was to become where the edit acts wholly. Null of `add`."
    )
    after: list[float | None] | None = Field(
        default=None,
        description="The number read again behind all edits of its place. It need not be the target, because encoder "
        "columns are not decoder rows. Null of `add`, and of transcoders, which read elsewhere.",
    )
    dose: list[float | None] = Field(
        description="The norm of what it has written, by that of what was there before the place's first edit."
    )


class WatchValues(Reply):
    """What one watch has read, a value for every token."""

    watch: SteerWatch | Literal["edits"] = Field(description="As it was asked for.")
    before: list[Watched] | None = Field(
        default=None, description="What came to that place, where this text is steered there; null where it is not."
    )
    after: list[Watched] | None = Field(
        default=None,
        description="What the rest of the model read: the activation of `index`, the features of `top_k`, strongest "
        "first, the vector at `hook`, or a list with every layer of `lens`. The value at a token is the one where that "
        "token is the input, as "
        "`activations` gives on the finished text. Null of `edits`.",
    )
    edits: list[WatchedEdit] | None = Field(
        default=None, description="Of `edits`: every edit of this text, in their order. Else null."
    )


class SteerWatched(Reply):
    """What was read of one text."""

    tokens: list[str] = Field(
        description="The tokens of prompt and text whose values are known; all of them once the text has ended."
    )
    values: list[WatchValues] = Field(description="One entry per watch, in the order of the request.")
