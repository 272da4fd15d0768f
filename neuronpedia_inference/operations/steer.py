"""steer/completion and steer/completion-chat. The buffered answer is the last event of the stream."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.completion import Begun, Completion
from neuronpedia_inference.domain import ChatMessage, Sampling
from neuronpedia_inference.edits.plan import BY_METHOD, Direction, Edit, Feature, Plan
from neuronpedia_inference.edits.proof import Proof
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.chat import open_reasoning, read_answer, without_reasoning
from neuronpedia_inference.operations.dosing import Doses
from neuronpedia_inference.operations.kept_vectors import numbers_of
from neuronpedia_inference.operations.operation import Events, Operation, last
from neuronpedia_inference.operations.persona import as_read, assistant_axis, longest
from neuronpedia_inference.operations.prompts import check_model, persona_here
from neuronpedia_inference.operations.story import ENDS_S, Story, Transcript
from neuronpedia_inference.operations.watching import Watched
from neuronpedia_inference.schemas.persona import AssistantAxis
from neuronpedia_inference.schemas.steer import (
    NPSteerChatMessage,
    NPSteerChatResult,
    NPSteerCompletionOutput,
    SteerCompletionChatRequest,
    SteerCompletionChatResponse,
    SteerCompletionRequest,
    SteerCompletionResponse,
    SteerFields,
)
from neuronpedia_inference.schemas.watch import AskedWatch

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

Plans = Sequence[Plan | None]
STEER_RULE = "Invalid request data: exactly one of features or vectors must be provided"


async def steer_completion(request: SteerCompletionRequest, rt: Runtime) -> SteerCompletionResponse:
    """Generated text per type, in request order. Raises InvalidRequest, UnknownSource, LimitExceeded."""
    return await last(await _complete(request, rt, stream=False))


async def steer_completion_events(
    request: SteerCompletionRequest, rt: Runtime
) -> AsyncIterator[SteerCompletionResponse]:
    """As `steer_completion`, growing token by token."""
    return await _complete(request, rt, stream=True)


async def steer_completion_chat(request: SteerCompletionChatRequest, rt: Runtime) -> SteerCompletionChatResponse:
    """Answered chat per type, in request order. Raises InvalidRequest, UnknownSource, LimitExceeded."""
    return await last(await _complete_chat(request, rt, stream=False))


async def steer_completion_chat_events(
    request: SteerCompletionChatRequest, rt: Runtime
) -> AsyncIterator[SteerCompletionChatResponse]:
    """As `steer_completion_chat`, growing token by token."""
    return await _complete_chat(request, rt, stream=True)


async def _complete(
    request: SteerCompletionRequest, rt: Runtime, *, stream: bool
) -> AsyncIterator[SteerCompletionResponse]:
    plan = _plan(request, rt)
    wanted = Completion(request.prompt, _plans(request, plan), sampling_of(request), named=plan)
    story = await text_story(wanted, rt, stream=stream)
    return Events(story, lambda _: _texts(request, story.rows))


async def _complete_chat(
    request: SteerCompletionChatRequest, rt: Runtime, *, stream: bool
) -> AsyncIterator[SteerCompletionChatResponse]:
    plan = _plan(request, rt, skip_special_tokens=not request.steer_special_tokens)
    tells_axes = request.is_assistant_axis and rt.persona is not None
    said = as_read(request.prompt, persona_here(rt)) if tells_axes else request.prompt
    ahead = partial(longest, n_new=request.n_completion_tokens, rt=rt)
    wanted = Completion(
        turns(said),
        _plans(request, plan),
        sampling_of(request),
        then=ahead if tells_axes else None,
        named=plan,
    )
    chat, story = await chat_story(said, wanted, rt, stream=stream)
    if tells_axes:
        return WithAxis(story, lambda _: _chats(request, chat, story.rows), partial(_axes, request, chat, story, rt))
    return Events(story, lambda _: _chats(request, chat, story.rows))


class WithAxis(Events[Any, SteerCompletionChatResponse]):
    """Events of a chat, of which the last also tells where its messages lie on the persona axes."""

    def __init__(
        self,
        story: Story,
        turn: Callable[[Any], SteerCompletionChatResponse],
        axes: Callable[[], Awaitable[list[AssistantAxis]]],
    ) -> None:
        super().__init__(story, turn)
        self._story = story
        self._axes = axes

    async def __anext__(self) -> SteerCompletionChatResponse:
        event = await super().__anext__()
        if not self._story.has_ended:
            return event
        await self._story.rest(ENDS_S)
        return event.model_copy(update={"assistant_axis": await self._axes()})


async def _axes(request: SteerCompletionChatRequest, chat: Chat, story: Story, rt: Runtime) -> list[AssistantAxis]:
    """One per output, in order."""
    n_prompt = len(story.begun.prompt)
    return [
        await assistant_axis(kind, turns(chat.with_answer(row)), n_prompt, plan, rt)
        for kind, row, plan in zip(request.types, story.rows, story.wanted.plans, strict=True)
    ]


@dataclass(frozen=True)
class Chat:
    """A chat that waits for its answer."""

    messages: list[NPSteerChatMessage]
    raw: str
    """As the model reads it, special tokens included."""
    opened: str
    """What the template has opened of the answer's reasoning."""

    def with_answer(self, row: Transcript) -> list[NPSteerChatMessage]:
        """The messages, and the answer once it has content."""
        content = read_answer(row.text.text, self.opened)
        return [*self.messages, *([NPSteerChatMessage(role="assistant", content=content)] if content else [])]


async def text_story(
    wanted: Completion, rt: Runtime, *, stream: bool, keeps_ending: bool = True, watch: Sequence[AskedWatch] = ()
) -> Story:
    """A row per plan, in order. Raises every 4xx and 503 before it returns.

    keeps_ending: whether texts end in the token that stopped them, as the wire's do. watch: the first of what is
    watched is told as this asks for it; what is behind it only `rules` look at.
    """
    begun = await rt.complete(wanted, stream=stream)
    return story_of("", begun, wanted, rt, keeps_ending=keeps_ending, watch=watch)


async def chat_story(
    said: list[NPSteerChatMessage],
    wanted: Completion,
    rt: Runtime,
    *,
    stream: bool,
    keeps_ending: bool = True,
    watch: Sequence[AskedWatch] = (),
) -> tuple[Chat, Story]:
    """As `text_story`, for the answers to a chat."""
    begun = await rt.complete(wanted, stream=stream)
    chat = Chat(said, rt.decode(begun.prompt.ids), open_reasoning(begun.rendered))
    return chat, story_of(chat.raw, begun, wanted, rt, keeps_ending=keeps_ending, watch=watch)


def turns(said: Sequence[NPSteerChatMessage]) -> list[ChatMessage]:
    """What the model is to read of a chat: reasoning of earlier answers is left out. Raises InvalidRequest."""
    messages = without_reasoning([ChatMessage(one.role, one.content) for one in said])
    if not messages:
        raise InvalidRequest("At least one message with content is required")
    return messages


def story_of(
    raw: str, begun: Begun, wanted: Completion, rt: Runtime, *, keeps_ending: bool, watch: Sequence[AskedWatch]
) -> Story:
    """What has begun, with what is told of it. raw: what its rows begin with."""
    has_logprobs = bool(wanted.sampling.n_logprobs)
    has_events = wanted.reads is not None and any(wanted.reads.retries)
    rows = [
        Transcript(raw, has_logprobs=has_logprobs, keeps_ending=keeps_ending, has_events=has_events)
        for _ in wanted.plans
    ]
    if wanted.reads is not None and watch:
        for row, edited, resolved in zip(rows, begun.edited, begun.resolved, strict=True):
            edits = [one.edit for one in resolved]
            row.watched = Watched(watch, wanted.reads.watches, edited, edits, begun.prompt.strings, rt)
    for row, plan in zip(rows, wanted.plans, strict=True):
        if plan is not None and plan.max_dose is not None and plan.warns:
            row.doses = Doses(plan.edits, plan.max_dose.value)
    for row, resolved in zip(rows, begun.resolved, strict=True) if wanted.proves else ():
        row.proof = Proof(resolved, begun.prompt)
    return Story(wanted, begun, rows)


def sampling_of(request: SteerFields) -> Sampling:
    """How its tokens are drawn."""
    return Sampling(
        max_new_tokens=request.n_completion_tokens,
        temperature=request.temperature,
        freq_penalty=request.freq_penalty,
        seed=request.seed,
        n_logprobs=request.n_logprobs or 0,
    )


def _plan(request: SteerFields, rt: Runtime, *, skip_special_tokens: bool = False) -> Plan | None:
    """What the request names; None where nothing is named to steer with. Raises InvalidRequest."""
    check_model(request.model, rt)
    if (request.features is None) == (request.vectors is None):
        raise InvalidRequest(STEER_RULE)
    if len(set(request.types)) < len(request.types):
        raise InvalidRequest("types: each of STEERED and DEFAULT may be given once")
    edits = _edits(request, rt)
    if any(not math.isfinite(edit.amount) for edit in edits):
        raise InvalidRequest("strength_multiplier × strength is too large to be a number")
    return Plan(edits, skip_special_tokens) if edits else None


def _plans(request: SteerFields, plan: Plan | None) -> Plans:
    """One per requested type, in order."""
    return [plan if kind == "STEERED" else None for kind in request.types]


def _edits(request: SteerFields, rt: Runtime) -> tuple[Edit, ...]:
    do, factor = BY_METHOD[request.steer_method], request.strength_multiplier
    features = [(Feature(one.source, one.index), one.strength) for one in request.features or ()]
    vectors = [
        (Direction(one.hook, numbers_of(one.steering_vector, rt)), one.strength) for one in request.vectors or ()
    ]
    return tuple(
        Edit(do, target, factor * strength, normalize=request.normalize_steering)
        for target, strength in (*features, *vectors)
    )


def _texts(request: SteerFields, rows: Sequence[Transcript]) -> SteerCompletionResponse:
    return SteerCompletionResponse.model_construct(
        outputs=[
            NPSteerCompletionOutput.model_construct(type=kind, output=row.text, logprobs=row.logprobs)
            for kind, row in zip(request.types, rows, strict=True)
        ]
    )


def _chats(request: SteerCompletionChatRequest, chat: Chat, rows: Sequence[Transcript]) -> SteerCompletionChatResponse:
    return SteerCompletionChatResponse.model_construct(
        outputs=[
            NPSteerChatResult.model_construct(
                raw=row.raw, chat_template=chat.with_answer(row), type=kind, logprobs=row.logprobs
            )
            for kind, row in zip(request.types, rows, strict=True)
        ],
        input=NPSteerChatResult(raw=chat.raw, chat_template=chat.messages),
    )


STEER_COMPLETION = Operation(
    name="steer_completion",
    path="/v1/steer/completion",
    request=SteerCompletionRequest,
    response=SteerCompletionResponse,
    summary="Continue a text, steered, unsteered or both",
    run=steer_completion,
    stream=steer_completion_events,
    omits_null=True,
)
STEER_COMPLETION_CHAT = Operation(
    name="steer_completion_chat",
    path="/v1/steer/completion-chat",
    request=SteerCompletionChatRequest,
    response=SteerCompletionChatResponse,
    summary="Answer a chat, steered, unsteered or both",
    run=steer_completion_chat,
    stream=steer_completion_chat_events,
    omits_null=True,
)
