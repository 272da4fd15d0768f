"""persona/monitor, and `assistant_axis` of steered chats: where messages lie on persona axes (contract 3.10, 4.8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import ChatMessage, Numbers, Tokens
from neuronpedia_inference.edits.plan import Plan
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model, persona_here
from neuronpedia_inference.points import RESID_POST, Point
from neuronpedia_inference.questions.states import States
from neuronpedia_inference.schemas.persona import (
    AssistantAxis,
    AssistantAxisTurn,
    PersonaMonitorRequest,
    PersonaMonitorResponse,
    PersonaTurn,
)
from neuronpedia_inference.schemas.steer import NPSteerChatMessage, NPSteerType

if TYPE_CHECKING:
    from neuronpedia_inference.persona import Persona
    from neuronpedia_inference.runtime import Runtime

ASSISTANT, SYSTEM = "assistant", "system"
SNIPPET = 120
"""Characters of a message that are told."""
CLOSING = 64
"""Tokens that a chat template may write around an answer."""


async def persona_monitor(request: PersonaMonitorRequest, rt: Runtime) -> PersonaMonitorResponse:
    """Raises InvalidRequest where no persona is served, for another layer than its own, and for an empty chat."""
    check_model(request.model, rt)
    persona = persona_here(rt)
    if request.layer not in (None, persona.layer):
        raise InvalidRequest(
            f"layer: the axes of this model were fitted at layer {persona.layer}, not {request.layer}. Leave it out."
        )
    if not request.conversation:
        raise InvalidRequest("conversation: at least one message is required")
    messages = [ChatMessage(one.role, one.content) for one in request.conversation]
    if persona.blanks_system_message and messages[0].role == SYSTEM:
        messages[0] = replace(messages[0], content="")
    means = await message_means(messages, persona.layer, rt)
    return PersonaMonitorResponse(
        pc_titles=list(persona.titles),
        turns=[
            PersonaTurn(pc_values=persona.values(mean), snippet=_snippet(message))
            for message, mean in zip(_assistants(messages), means, strict=True)
        ],
    )


async def assistant_axis(
    kind: NPSteerType, messages: Sequence[ChatMessage], n_prompt: int, plan: Plan | None, rt: Runtime
) -> AssistantAxis:
    """Of one output. messages: as they are rendered; n_prompt: tokens before the answer; plan: what has steered it."""
    persona = persona_here(rt)
    limit = n_prompt + rt.settings.max_tokens + CLOSING
    plain = await message_means(messages, persona.layer, rt, limit=limit)
    steered = None
    if plan is not None:
        steered = await message_means(messages, persona.layer, rt, limit=limit, plan=plan, n_prompt=n_prompt)
    turns = [
        AssistantAxisTurn(
            pc_values=persona.values(plain[number]),
            pc_values_post_cap=None if steered is None else persona.values(steered[number]),
            snippet=_snippet(message),
        )
        for number, message in enumerate(_assistants(messages))
    ]
    return AssistantAxis(type=kind, pc_titles=list(persona.titles), turns=turns)


def longest(prompt: Tokens, n_new: int, rt: Runtime) -> States:
    """What `assistant_axis` asks at a time, of so many new tokens at the most."""
    return _states(prompt.longer(n_new + CLOSING), persona_here(rt).layer, rt)


def as_read(said: Sequence[NPSteerChatMessage], persona: Persona) -> list[NPSteerChatMessage]:
    """A chat as it is rendered where its place on the axes is told: without what a leading system message says, where
    the axes were fitted so."""
    is_blanked = persona.blanks_system_message and bool(said) and said[0].role == SYSTEM
    return [said[0].model_copy(update={"content": ""}), *said[1:]] if is_blanked else list(said)


async def message_means(
    messages: Sequence[ChatMessage],
    layer: int,
    rt: Runtime,
    *,
    limit: int = 0,
    plan: Plan | None = None,
    n_prompt: int = 0,
) -> list[Numbers]:
    """Of every message of the assistant's the mean behind a layer over its tokens: [d_model].

    limit: tokens of the chat; 0 is TOKEN_LIMIT.
    """
    chat = await rt.apply_chat_template(messages, generation_prompt=False, options={}, limit=limit)
    generated = () if plan is None else (max(0, len(chat.tokens) - n_prompt),)
    question = _states(chat.tokens, layer, rt)
    [states] = await rt.ask(question, plan, generated)
    [point] = question.points
    found: list[Numbers] = []
    for number, message in enumerate(messages):
        places = [place for place, part in enumerate(chat.parts) if part.message == number]
        if message.role == ASSISTANT:
            if not places:
                raise InvalidRequest(f"Message {number} adds no token to the chat, so it has no place on an axis.")
            found.append(states[point][places].mean(axis=0))
    return found


def _states(tokens: Tokens, layer: int, rt: Runtime) -> States:
    point = Point(layer, RESID_POST)
    return States([tokens], [point], "all", len(tokens) * rt.width(point))


def _assistants(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    return [message for message in messages if message.role == ASSISTANT]


def _snippet(message: ChatMessage) -> str:
    return message.content if len(message.content) <= SNIPPET else message.content[:SNIPPET] + "..."


PERSONA_MONITOR = Operation(
    name="persona_monitor",
    path="/v1/persona/monitor",
    request=PersonaMonitorRequest,
    response=PersonaMonitorResponse,
    summary="Where the assistant's messages lie on the persona axes",
    run=persona_monitor,
)
