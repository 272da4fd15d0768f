"""Chats as the model reads them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from neuronpedia_inference.domain import Section
from neuronpedia_inference.schemas.common import EchoedText, Many, Name, Reply, Wire, examples
from neuronpedia_inference.schemas.steer import AtMostMessages


class TemplateMessage(Wire):
    """One message of a chat."""

    role: Name = Field(description="Who speaks: a role that the model's chat template knows, such as `user`.")
    content: EchoedText = Field(description="What is said.")
    channel: Name | None = Field(default=None, description="Of models that speak on several channels.")


class ApplyChatTemplateRequest(Wire):
    """A chat, to be written as the model's chat template writes it."""

    messages: Annotated[Many[TemplateMessage], AtMostMessages] = Field(description="The chat so far, oldest first.")
    add_generation_prompt: bool = Field(default=True, description="End with what begins the assistant's answer.")
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description='What the template is given beside the messages, such as `{"enable_thinking": false}`.'
    )

    model_config = ConfigDict(
        strict=False,
        json_schema_extra=examples(
            {
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "add_generation_prompt": True,
            }
        ),
    )


class TokenSpan(Reply):
    """A token of the rendered chat, and what it belongs to."""

    position: int = Field(description="Its place in `tokens`.")
    token_id: int = Field(description="Its id.")
    token_str: str = Field(description="The token as text.")
    message_index: int | None = Field(description="The message it belongs to; null after the last one.")
    role: str | None = Field(description="Who speaks there; `assistant` after the last message.")
    channel: str | None = Field(description="The message's channel; null where it has none.")
    section: Section = Field(
        description="header, content or footer of its message; scaffold where the template does not tell them apart."
    )


class ApplyChatTemplateResponse(Reply):
    """The chat as the model reads it."""

    prompt: str = Field(description="The rendered chat.")
    tokens: list[int] = Field(description="Its token ids; no BOS is added to what the template writes.")
    spans: list[TokenSpan] = Field(description="One per token, in order.")
