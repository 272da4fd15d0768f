"""apply_chat_template: a chat as the model reads it, token by token with the message it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronpedia_inference.domain import ChatMessage
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.schemas.chat import ApplyChatTemplateRequest, ApplyChatTemplateResponse, TokenSpan

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

ANSWERS = "assistant"
"""Whose turn begins behind the last message."""


async def apply_chat_template(request: ApplyChatTemplateRequest, rt: Runtime) -> ApplyChatTemplateResponse:
    """Raises InvalidRequest where there is no template or it refuses the chat, LimitExceeded beyond TOKEN_LIMIT."""
    messages = [ChatMessage(one.role, one.content, one.channel) for one in request.messages]
    chat = await rt.apply_chat_template(
        messages, generation_prompt=request.add_generation_prompt, options=request.chat_template_kwargs
    )

    def span(position: int) -> TokenSpan:
        part = chat.parts[position]
        message = None if part.message is None else messages[part.message]
        return TokenSpan(
            position=position,
            token_id=chat.tokens.ids[position],
            token_str=chat.tokens.strings[position],
            message_index=part.message,
            role=ANSWERS if message is None else message.role,
            channel=None if message is None else message.channel,
            section=part.section,
        )

    return ApplyChatTemplateResponse.model_construct(
        prompt=chat.text, tokens=list(chat.tokens.ids), spans=Rows(len(chat.parts), span)
    )


APPLY_CHAT_TEMPLATE = Operation(
    name="apply_chat_template",
    path="/v1/apply-chat-template",
    request=ApplyChatTemplateRequest,
    response=ApplyChatTemplateResponse,
    summary="A chat as the model's chat template writes it, token by token",
    run=apply_chat_template,
    casing="camel",
)
