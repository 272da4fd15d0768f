"""Activation routes: one feature, the strongest features, features per token, everything that fires."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import (
    MAX_NAMES,
    MAX_NUMBERS,
    AtMost,
    AtMostABatch,
    Many,
    MaybeModelName,
    MayBeTensors,
    ModelName,
    Name,
    NumResults,
    OnePrompt,
    Ours,
    Reply,
    Reproducible,
    SeveralPrompts,
    SourceName,
    SourceSetName,
    TopK,
    examples,
)
from neuronpedia_inference.schemas.vectors import Vector

_MODEL = "smollm2-135m-instruct"
_TEXT = "The cat sat on the mat."
_TEXTS = ["The cat sat on the mat.", "The court heard the case."]

TokenStrings = Annotated[list[str], Field(description="The prompt's tokens as text.")]
AllTokens = Annotated[list[str], Field(description="All tokens of the prompt as text; positions are places in it.")]
HasBos = Annotated[bool, Field(description="Whether the first of `tokens` is the BOS token.")]
OursPrompt = Annotated[
    str | Annotated[Many[str], AtMostABatch], Field(description="A text, or 1 to 4 texts; none may be empty.")
]


class FeatureOrVector(MayBeTensors):
    """What to measure: `source` with `index`, or `vector` with `hook`."""

    model: ModelName
    source: SourceName | None = Field(default=None, description="Source of the feature; goes with `index`.")
    index: Name | None = Field(
        default=None, description='Index of the feature as a decimal string, such as "42"; goes with `source`.'
    )
    vector: Vector | None = Field(
        default=None, description="Direction to project on, as wide as the hook; goes with `hook`."
    )
    hook: Name | None = Field(
        default=None, description='Where to project, such as "blocks.15.hook_resid_post"; goes with `vector`.'
    )


class ActivationSingleRequest(FeatureOrVector, OnePrompt):
    """One feature, or one custom vector, over one prompt.

    As tensors: `values`, [token].
    """

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompt": _TEXT, "model": _MODEL, "source": "15-res-4k", "index": "42"},
            {
                "prompt": _TEXT,
                "model": _MODEL,
                "vector": [0.1] * 576,
                "hook": "blocks.15.hook_resid_post",
            },
        )
    )


class ActivationSingleBatchRequest(FeatureOrVector, SeveralPrompts):
    """One feature, or one custom vector, over several prompts.

    As tensors: `0/values` for the first, [token], and so on.
    """

    model_config = ConfigDict(
        json_schema_extra=examples({"prompts": _TEXTS, "model": _MODEL, "source": "15-res-4k", "index": "42"})
    )


class ActivationValues(Reply):
    """Activations of one feature. Attribution tells which earlier tokens an attention feature's peak came from."""

    values: list[float] = Field(description="Activation at each token of `tokens`.")
    max_value: float = Field(description="Largest of `values`.")
    max_value_index: int = Field(description="First position of `max_value` in `values`.")
    dfa_values: list[float] | None = Field(
        default=None, description="Attribution of each token; null unless the source is an attention-output SAE."
    )
    dfa_target_index: int | None = Field(
        default=None,
        description="Position in `values` that is explained: where the feature fires most.",
    )
    dfa_max_value: float | None = Field(default=None, description="Largest of `dfa_values`.")


class FeatureId(Reply):
    """Which feature."""

    source: SourceName
    index: int = Field(description="Index of the feature in its source.")


class ActivationSingleResponse(Reply):
    """One feature over one prompt. For an SAE feature a leading BOS token is left out of all three lists."""

    activation: ActivationValues = Field(description="The activations.")
    tokens: TokenStrings
    tokens_is_special: list[bool] = Field(
        description="Per token, whether it is one of the tokenizer's special tokens and not content."
    )


class ActivationSingleBatchResponse(Reply):
    """One result per prompt, in request order; each equals the answer for that prompt alone."""

    results: list[ActivationSingleResponse] = Field(description="One entry per prompt.")


class RankingFields(MayBeTensors):
    """How the strongest features are chosen."""

    model: ModelName
    source_set: SourceSetName
    selected_sources: Annotated[Many[Name], AtMost(MAX_NAMES)] = Field(
        description="Sources of the set to look at; `[]` means all of them."
    )
    sort_by_token_indexes: Annotated[Many[int], AtMost(MAX_NUMBERS)] = Field(
        description="Rank by the sum of activations at these positions (BOS counts); `[]`: by the maximum."
    )
    ignore_bos: bool = Field(description="Count activations on a leading BOS token as zero.")
    num_results: NumResults = 25


class ActivationAllRequest(RankingFields, OnePrompt):
    """The features of a source set that fire most on one prompt.

    As tensors: `values`, [feature, token], in the order of `activations`.
    """

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "prompt": _TEXT,
                "model": _MODEL,
                "source_set": "res-4k",
                "selected_sources": ["10-res-4k", "20-res-4k"],
                "sort_by_token_indexes": [],
                "ignore_bos": True,
                "num_results": 10,
            }
        )
    )


class ActivationAllBatchRequest(RankingFields, SeveralPrompts):
    """The features of a source set that fire most, for several prompts.

    As tensors: `0/values` for the first, [feature, token], and so on.
    """

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "prompts": _TEXTS,
                "model": _MODEL,
                "source_set": "res-4k",
                "selected_sources": [],
                "sort_by_token_indexes": [],
                "ignore_bos": True,
                "num_results": 10,
            }
        )
    )


class ActivationAllFeature(ActivationValues, FeatureId):
    """One feature that fires on the prompt."""

    sum_values: float | None = Field(
        default=None, description="Sum over `sort_by_token_indexes`; 0 when the ranking is by the maximum."
    )


class ActivationAllResponse(Reply):
    """The strongest features, best first."""

    activations: list[ActivationAllFeature] = Field(description="The features, strongest first.")
    tokens: TokenStrings
    counts: list[list[float]] | None = Field(default=None, description="Not served; always null.")


class ActivationAllBatchResponse(Reply):
    """One result per prompt, in request order."""

    results: list[ActivationAllResponse] = Field(description="One entry per prompt.")


class TopkFields(MayBeTensors):
    """What to list for each token."""

    model: ModelName
    source: SourceName
    top_k: TopK = None
    ignore_bos: bool = Field(description="Leave a leading BOS token out of the answer.")


class ActivationTopkByTokenRequest(TopkFields, OnePrompt):
    """The strongest features at each token of one prompt.

    As tensors: `indices` and `values`, [token, k].
    """

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompt": _TEXT, "model": _MODEL, "source": "15-res-4k", "top_k": 5, "ignore_bos": True}
        )
    )


class ActivationTopkByTokenBatchRequest(TopkFields, SeveralPrompts):
    """The strongest features at each token of several prompts.

    As tensors: `0/indices` and `0/values` for the first, [token, k], and so on.
    """

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompts": _TEXTS, "model": _MODEL, "source": "15-res-4k", "top_k": 5, "ignore_bos": True}
        )
    )


class ActivationTopkByTokenFeature(Reply):
    """A feature at a token."""

    feature_index: int = Field(description="Index of the feature in the source.")
    activation_value: float = Field(description="Its activation at this token.")


class TokenFields(Reply):
    """One token of the prompt."""

    token_position: int = Field(description="Position in the full prompt, BOS included.")
    token: str = Field(description="The token as text.")
    is_special: bool = Field(description="Whether it is a special token of the tokenizer and not content.")


class ActivationTopkByTokenResult(TokenFields):
    """A token and its strongest features."""

    top_features: list[ActivationTopkByTokenFeature] = Field(description="Strongest first; zeros included.")


class ActivationTopkByTokenResponse(Reply):
    """The strongest features of every token."""

    results: list[ActivationTopkByTokenResult] = Field(description="One entry per token of `tokens`.")
    tokens: TokenStrings


class ActivationTopkByTokenBatchResponse(Reply):
    """One result per prompt, in request order."""

    results: list[ActivationTopkByTokenResponse] = Field(description="One entry per prompt.")


class ActivationSourceRequest(MayBeTensors, SeveralPrompts):
    """Every feature of a source that fires.

    As tensors, of each prompt: feature `indices[i]` fires at `positions[starts[i]:ends[i]]` with the activations
    `values[starts[i]:ends[i]]`, unrounded. Those of the first are `0/indices` and so on.
    """

    model: ModelName
    source: SourceName

    model_config = ConfigDict(json_schema_extra=examples({"prompts": _TEXTS, "model": _MODEL, "source": "15-res-4k"}))


class ActivationSourceResult(Reply):
    """What fires on one prompt."""

    tokens: TokenStrings
    # camelCase in every spelling of the wire
    activeFeatures: dict[str, list[tuple[int, float]]] | None = Field(
        default=None,
        description="Feature index → [token position, activation] pairs, in order of first firing. Positions "
        "count BOS, which itself is skipped; activations have 3 decimals.",
    )


class ActivationSourceResponse(Reply):
    """One result per prompt, in request order."""

    results: list[ActivationSourceResult] = Field(description="One entry per prompt.")


class ActivationsRequest(Ours):
    """Features on one prompt or several: the strongest of those that fire, or with `index` a single one.

    The numbers are those of `activation/all` and `activation/single`; positions count all tokens, BOS included.
    """

    prompt: OursPrompt
    source: SourceName | None = Field(
        default=None, description="Source to look at; may be left out where the choice is clear."
    )
    source_set: SourceSetName | None = Field(
        default=None, description="Source set to look at; may be left out when only one is loaded."
    )
    index: int | None = Field(default=None, description="Show this feature only, also where it does not fire.")
    num_results: Annotated[int, Field(ge=0)] | None = Field(
        default=25,
        description="Features returned at most; null means 25. More than MAX_RESULTS are refused. Not with `index`.",
    )
    ignore_bos: bool = Field(default=True, description="Count activations on a leading BOS token as zero.")
    rank_by: Literal["activation", "relative"] = Field(
        default="activation",
        description="What comes first: what fires most, or what is peculiar to the text. `relative` is the largest "
        "activation as a share of the feature's known maximum, times -log10 of its known density; features of which "
        "these are unknown come last. Goes without `index`.",
    )
    min_activation: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Leave out features whose largest activation is smaller. Goes without `index`."
    )
    reproducible: Reproducible = False
    model: MaybeModelName = None

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompt": _TEXT, "num_results": 5},
            {"prompt": _TEXTS, "source": "15-res-4k", "index": 42},
        )
    )


class LabelledFeature(ActivationValues, FeatureId):
    """A feature, with its label where one is known."""

    label: str | None = Field(default=None, description="What the feature stands for; null if unknown.")
    relative: float | None = Field(
        default=None, description="The number that ranks by `relative`; null without it, and where it is unknown."
    )


class ActivationsResult(Reply):
    """Features on one prompt."""

    tokens: AllTokens
    has_bos: HasBos
    features: list[LabelledFeature] = Field(
        description="Those that fire, strongest first; with `index` exactly one, of zeros if it does not fire."
    )


class ActivationsResponse(Reply):
    """Always a list, also for a single prompt."""

    results: list[ActivationsResult] = Field(description="One entry per prompt, in request order.")


class TopKRequest(Ours):
    """The strongest features at each token of one prompt or several."""

    prompt: OursPrompt
    source: SourceName | None = Field(
        default=None, description="Source to look at; may be left out when only one is loaded."
    )
    top_k: TopK = 5
    ignore_bos: bool = Field(default=True, description="List no features at a leading BOS token.")
    rank_by: Literal["activation", "relative"] = Field(
        default="activation",
        description="What comes first at a token: what fires most, or what is peculiar to it. `relative` is the "
        "activation as a share of the feature's known maximum, times -log10 of its known density; features of which "
        "these are unknown come last.",
    )
    reproducible: Reproducible = False
    model: MaybeModelName = None

    model_config = ConfigDict(json_schema_extra=examples({"prompt": _TEXT, "source": "15-res-4k", "top_k": 3}))


class LabelledTopFeature(ActivationTopkByTokenFeature):
    """A feature at a token, with its label where one is known."""

    label: str | None = Field(default=None, description="What the feature stands for; null if unknown.")
    relative: float | None = Field(
        default=None, description="The number that ranks by `relative`; null without it, and where it is unknown."
    )


class LabelledToken(TokenFields):
    """A token and its strongest features."""

    top_features: list[LabelledTopFeature] = Field(
        description="Those that fire, strongest first; none at a BOS token that is ignored."
    )


class TopKResult(Reply):
    """The strongest features of every token of one prompt."""

    source: SourceName
    tokens: AllTokens
    has_bos: HasBos
    positions: list[LabelledToken] = Field(description="One entry per token of `tokens`, in their order.")


class TopKResponse(Reply):
    """Always a list, also for a single prompt."""

    results: list[TopKResult] = Field(description="One entry per prompt, in request order.")
