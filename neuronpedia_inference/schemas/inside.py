"""What passes inside the model: raw residual streams, and where attention heads look."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import AtMost, Many, MaybeModelName, MayBeTensors, ModelName, Reply, examples

_MODEL = "smollm2-135m-instruct"
MAX_TEXTS = 16
"""Prompts of one request."""
MAX_LAYERS = 4096

AtMostTexts = AtMost(MAX_TEXTS, "Batch size {n} exceeds maximum of {most}")


class ActivationAttentionRequest(MayBeTensors):
    """Where one attention head looks.

    As tensors: `queries`, `keys` and `weights`, one entry for each key that is shown, the weights unrounded.
    """

    prompt: str = Field(description="Text to run through the model.")
    model: ModelName
    layer: int = Field(description="The layer, from 0.")
    head: int = Field(description="The query head in it, from 0.")

    model_config = ConfigDict(
        strict=False,
        json_schema_extra=examples({"prompt": "The cat sat on the mat.", "model": _MODEL, "layer": 3, "head": 1}),
    )


class ActivationAttentionResponse(Reply):
    """The head's pattern, sparse: of every query the 8 keys that weigh most, where they weigh 0.005 at least."""

    seq_len: int = Field(description="Tokens of the prompt, BOS included.")
    attention_indices: list[int] = Field(description="query × seq_len + key, ascending.")
    attention_values: list[float] = Field(description="The weight of each after the softmax, with 4 decimals.")
    max_activation: float = Field(description="The largest weight whose query and key both lie behind position 0.")
    tokens: list[str] = Field(description="The prompt's tokens as text.")


class ActivationRawRequest(MayBeTensors):
    """The residual stream behind layers, at each prompt's last token.

    As tensors: `0/blocks.15.hook_resid_post` for layer 15 of the first prompt, [1, d_model], unrounded.
    """

    prompts: Annotated[Many[str], AtMostTexts] = Field(description="1 to 16 texts to run through the model.")
    layers: Annotated[Many[int], AtMost(MAX_LAYERS)] | None = Field(
        default=None, description="Layers to read; null or empty for all."
    )
    model: MaybeModelName = None
    hook_point: Literal["residual_stream"] = Field(default="residual_stream", description="What is read.")
    type: Literal["final_output_token"] = Field(default="final_output_token", description="Where it is read.")

    model_config = ConfigDict(
        strict=False,
        json_schema_extra=examples(
            {"prompts": ["The cat sat on the mat.", "The court heard the case."], "layers": [10, 15], "model": _MODEL}
        ),
    )


class RawActivation(Reply):
    """The residual stream behind one layer."""

    layer: int = Field(description="The layer.")
    token_indices: list[int] = Field(description="The positions read: the last one.")
    values: list[list[float]] = Field(
        description="[position, d_model]; with 4 decimals where the model's numbers have 16 bits."
    )


class RawResult(Reply):
    """One prompt."""

    token_strings: list[str] = Field(description="Its tokens as text.")
    token_ids: list[int] = Field(description="Its token ids, BOS included.")
    activations: list[RawActivation] = Field(description="One entry per layer, ascending.")


class ActivationRawResponse(Reply):
    """One result per prompt, in request order."""

    hook_point: str = Field(description="What was read.")
    type: str = Field(description="Where it was read.")
    dtype: str = Field(description="Precision of the model's numbers.")
    device: str = Field(description="Where the model is.")
    results: list[RawResult] = Field(description="One entry per prompt.")
