"""Captures: the vectors that pass at points of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, ConfigDict, Field

from neuronpedia_inference.domain import Positions, Precision
from neuronpedia_inference.schemas.common import (
    MAX_NAMES,
    AtMost,
    Many,
    MaybeModelName,
    MayBeTensors,
    Name,
    Ours,
    Reply,
    Reproducible,
    examples,
)
from neuronpedia_inference.schemas.edits import Selection
from neuronpedia_inference.schemas.steer import AtMostMessages, NPSteerChatMessage, SteerSpecialTokens
from neuronpedia_inference.schemas.steering import Steering
from neuronpedia_inference.schemas.words import problem

_TEXT = "The cat sat on the mat."


def _words_or_selection(value: Any) -> Any:
    if isinstance(value, Mapping | Selection) or value in get_args(Positions):
        return value
    raise problem(f"is one of {', '.join(get_args(Positions))}, or a selection such as {{'first': 4}}")


class Places(Ours):
    """What is read."""

    prompt: str | Annotated[Many[str], AtMostMessages] | Annotated[Many[NPSteerChatMessage], AtMostMessages] = Field(
        description="A text, 1 to 16 texts, or the messages of a chat."
    )
    points: Annotated[Many[Name], AtMost(MAX_NAMES)] = Field(
        min_length=1, description='What to read, such as `["blocks.15.hook_resid_post"]`.'
    )


class CaptureRequest(Steering, Places, MayBeTensors):
    """The vectors that pass at points of the model, under any steering.

    A point is read behind its own edits, so its numbers are what the rest of the model reads. To what edits select, the
    texts are prompts.

    With `format: "safetensors"`, or the header `Accept: application/x-safetensors`, the answer is a file of tensors:
    one per point, named by it, `0/blocks...` where texts come as a list; the rest of the answer is JSON in its
    metadata, under `answer`.
    """

    positions: Annotated[Positions | Selection, BeforeValidator(_words_or_selection)] = Field(
        default="all",
        description="Every token, BOS included (`all`); each text's `last` one; the `mean` over tokens that are not "
        "special; or a selection as edits have it, of each text, without `ramp`.",
    )
    dtype: Precision = Field(default="float32", description="Precision of the answer's numbers.")
    steer_special_tokens: SteerSpecialTokens = False
    reproducible: Reproducible = False
    model: MaybeModelName = None

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompt": _TEXT, "points": ["blocks.15.hook_resid_post"], "positions": "mean"},
            {"prompt": [_TEXT, "Bake the bread."], "points": ["blocks.3.hook_mlp_out"], "positions": "last"},
            {
                "prompt": _TEXT,
                "points": ["blocks.29.hook_resid_post"],
                "positions": "last",
                "edits": [{"do": "clamp", "feature": "15-res-4k/1113", "amount": 60}],
            },
        )
    )


class CaptureResult(Reply):
    """One text."""

    tokens: list[str] = Field(description="All its tokens as text.")
    token_ids: list[int] = Field(description="Their ids.")
    is_special: list[bool] = Field(description="Which of them are special tokens.")
    has_bos: bool = Field(description="Whether the first of them is the BOS token.")
    positions: list[int] = Field(description="Which of them were read, in the order of the rows of `states`.")
    states: dict[str, list[list[float]]] = Field(
        description="Per point [n, width]: n is the number of `positions`, or 1 for `mean`; heads concatenated. "
        "Empty in the metadata of tensors."
    )


class CaptureResponse(Reply):
    """Always a list, also for a single text."""

    positions: Positions | Selection = Field(description="As asked for.")
    dtype: Precision = Field(description="Precision of the numbers.")
    results: list[CaptureResult] = Field(description="One entry per text, in request order.")
