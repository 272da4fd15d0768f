"""Tokenisation."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import ModelName, Reply, Wire, examples


class TokenizeRequest(Wire):
    """Split a text into the model's tokens."""

    model: ModelName
    text: str = Field(description="Text to split.")
    prepend_bos: bool | None = Field(
        default=None, description="Put a BOS token first, even if the text begins with one; null means true."
    )

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"model": "smollm2-135m-instruct", "text": "The quick brown fox", "prepend_bos": True}
        )
    )


class TokenizeResponse(Reply):
    """The tokens, as ids and as text."""

    tokens: list[int] = Field(description="Token ids.")
    token_strings: list[str] = Field(description="The same tokens as text.")
    prepend_bos: bool = Field(description="Whether a BOS token was put first; false if the model has none.")
