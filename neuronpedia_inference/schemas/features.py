"""Features themselves: search by words, and everything that is known of one."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from neuronpedia_inference.schemas.common import Name, Ours, Reply, encodable, examples

MAX_QUERY = 512
"""Characters of a search."""
MAX_SHOWN = 128
"""Neighbours and tokens of one feature."""

AnySource = Annotated[
    Name,
    Field(
        description='Source of features, such as "15-res-4k", or as in a Neuronpedia address a model and a source, '
        'such as "smollm2-135m-instruct/15-res-4k".'
    ),
]


class FeatureName(Reply):
    """Which feature, and what is known of it in one line."""

    source: str = Field(description="Its source.")
    index: int = Field(description="Index of the feature in its source.")
    label: str | None = Field(default=None, description="What the feature stands for; null if unknown.")


class FeatureContext(Reply):
    """A piece of text on which a feature fires."""

    tokens: list[str] = Field(description="Its tokens as text.")
    values: list[float] = Field(description="The feature's activation at each token.")
    origin: str | None = Field(default=None, description="Where the text is from; null if unknown.")


class SearchRequest(Ours):
    """Features by words, which are looked for in labels and contexts.

    Words are compared by their stems, and ranked by BM25; words such as "the" are left out.
    """

    q: Annotated[str, Field(min_length=1, max_length=MAX_QUERY), AfterValidator(encodable)] = Field(
        description="Words to look for."
    )
    source: AnySource | None = Field(
        default=None, description="Source to search; left out: all that have labels or contexts."
    )
    limit: Annotated[int, Field(ge=1)] = Field(
        default=10, description="Features returned at most. More than MAX_RESULTS are refused."
    )

    model_config = ConfigDict(
        json_schema_extra=examples({"q": "moon orbit", "limit": 3}, {"q": "economy", "source": "15-res-4k"})
    )


class FoundFeature(FeatureName):
    """A feature that has some of the words."""

    score: float = Field(description="BM25 of its label and contexts: larger is nearer.")
    density: float | None = Field(default=None, description="Share of tokens on which it fires; null if unknown.")
    max: float | None = Field(default=None, description="Its largest known activation; null if unknown.")
    context: FeatureContext | None = Field(
        default=None, description="The known context on which it fires most; null if none is known."
    )


class SearchResponse(Reply):
    """Features that have some of the words, nearest first; empty if none has."""

    features: list[FoundFeature] = Field(description="Nearest first.")


class FeatureRequest(Ours):
    """Everything that is known of one feature: from its weights, and from annotations where there are some."""

    source: AnySource
    index: Annotated[int, Field(ge=0)] = Field(description="Index of the feature in its source.")
    limit: Annotated[int, Field(ge=1, le=MAX_SHOWN)] = Field(
        default=10, description="Neighbours, and tokens promoted and suppressed, at most."
    )

    model_config = ConfigDict(json_schema_extra=examples({"source": "15-res-4k", "index": 1113}))


class Neighbour(FeatureName):
    """Another feature of the same source."""

    cosine_similarity: float = Field(description="Cosine of the angle between the two decoder rows.")


class TokenEffect(Reply):
    """A token whose logit the feature's direction moves."""

    token: str = Field(description="The token as text.")
    token_id: int = Field(description="Its id.")
    logit: float = Field(
        description="Change of its logit by the direct path, for the decoder row at unit length: final norm's gain "
        "and unembedding, nothing in between, without the scale of the residual stream."
    )


class FeatureResponse(FeatureName):
    """One feature. Weights are scaled as its activations are."""

    labels: list[str] = Field(description="All of its labels, the one shown first.")
    source_set: str = Field(description="The set its source belongs to.")
    hook: str = Field(description='Hook that it is read at, such as "blocks.15.hook_resid_post".')
    architecture: str = Field(description='Kind of its SAE, such as "jumprelu", or "neurons".')
    density: float | None = Field(
        default=None, description="Share of tokens on which it fires, of the text that its contexts are from."
    )
    max: float | None = Field(default=None, description="Its largest activation on that text.")
    mean: float | None = Field(default=None, description="Its mean activation where it fires on that text.")
    contexts: list[FeatureContext] = Field(description="Where it fires most on that text, the strongest first.")
    decoder: list[float] | None = Field(
        default=None, description="Its decoder row, which steering adds; null for neurons and where there is none."
    )
    encoder: list[float] | None = Field(default=None, description="Its encoder column; null for neurons.")
    norm: float | None = Field(default=None, description="Length of the decoder row.")
    bias: float | None = Field(default=None, description="Bias of its encoder; null where its kind has none.")
    threshold: float | None = Field(
        default=None, description="Pre-activation above which it fires; null where its kind has none."
    )
    neighbours: list[Neighbour] = Field(description="Features whose decoder rows point most alike.")
    promoted: list[TokenEffect] = Field(description="Tokens that its direction makes likelier by the direct path.")
    suppressed: list[TokenEffect] = Field(description="Tokens that it makes less likely.")
    no_tokens_because: str | None = Field(
        default=None, description="Why there are no tokens promoted and suppressed; null where there are."
    )
