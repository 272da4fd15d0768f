"""How likely continuations of a prompt are, under any steering."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import (
    MAX_NUMBERS,
    AtMost,
    Many,
    MaybeModelName,
    Ours,
    Reply,
    Reproducible,
    examples,
)
from neuronpedia_inference.schemas.steer import AtMostMessages, NLogprobs, NPSteerChatMessage, SteerSpecialTokens
from neuronpedia_inference.schemas.steering import Steering
from neuronpedia_inference.schemas.watch import NPLogprobTop

MAX_CONTINUATIONS = 64
"""Of one request."""

TokenIds = Annotated[Many[Annotated[int, Field(ge=0)]], AtMost(MAX_NUMBERS)]


class Scored(Ours):
    """What is scored."""

    prompt: str | TokenIds | Annotated[Many[NPSteerChatMessage], AtMostMessages] = Field(
        description="What comes before: a text, ids of tokens, or the messages of a chat whose answer is scored."
    )
    continuations: Annotated[Many[str | TokenIds], AtMost(MAX_CONTINUATIONS)] = Field(
        min_length=1,
        description="1 to 64 texts, or ids of tokens. A text is tokenised together with a prompt that is no list of "
        "ids, and scored from the first token that is not the prompt's alone; ids are put behind it as they are.",
    )


class ScoreRequest(Steering, Scored):
    """How likely the model finds continuations of a prompt, token by token, under any steering.

    What selects `generated` positions acts on the tokens of the continuations, as it would while they are written.
    """

    n_logprobs: NLogprobs = 0
    steer_special_tokens: SteerSpecialTokens = False
    reproducible: Reproducible = False
    model: MaybeModelName = None

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompt": "The capital of France is", "continuations": [" Paris.", " Lyon."]},
            {
                "prompt": "The most important thing is",
                "continuations": [" the economy.", " your friends."],
                "edits": [{"do": "clamp", "feature": "15-res-4k/1113", "amount": 60, "on": {"phase": "generated"}}],
            },
        )
    )


class ContinuationScore(Reply):
    """One continuation."""

    logprob: float = Field(description="Natural logarithm of its probability: the sum over its tokens.")
    logprob_per_token: float = Field(description="The mean over its tokens.")
    is_greedy: bool = Field(description="Whether every token is the likeliest at its place.")
    tokens: list[str] = Field(description="Its tokens as text.")
    token_ids: list[int] = Field(description="Their ids.")
    logprobs: list[float] = Field(description="Of each token, given all before it.")
    likeliest: list[list[NPLogprobTop]] | None = Field(
        default=None, description="Of each place the likeliest tokens, most likely first; null unless asked for."
    )
    begins_at: int = Field(
        description="Place of its first token in the whole text. Where the tokenizer joins a prompt's last letters to "
        "what follows, they are scored with it."
    )


class ScoreResponse(Reply):
    """Scores in the order of the continuations."""

    results: list[ContinuationScore] = Field(description="One entry per continuation.")
