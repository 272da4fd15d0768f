"""steer/completion and steer/completion-chat. The buffered answer is the last event of the stream."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import ChatMessage, Completion, Sampling, TokenLogprob, Tokens
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.chat import open_reasoning, read_answer, without_reasoning
from neuronpedia_inference.operations.operation import Events, Operation, last
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.schemas.steer import (
    NPLogprob,
    NPLogprobTop,
    NPSteerChatMessage,
    NPSteerChatResult,
    NPSteerCompletionOutput,
    SteerCompletionChatRequest,
    SteerCompletionChatResponse,
    SteerCompletionRequest,
    SteerCompletionResponse,
    SteerFields,
)
from neuronpedia_inference.steering.plan import Steer, SteerFeature, SteerMethod, SteerPlan, SteerVector

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

STEER_RULE = "Invalid request data: exactly one of features or vectors must be provided"
NO_PROBABILITY = -100.0


async def steer_completion(request: SteerCompletionRequest, rt: Runtime) -> SteerCompletionResponse:
    """Generated text per type, in request order. Raises InvalidRequest, UnknownSource, LimitExceeded."""
    return await last(_complete(request, rt, stream=False))


async def steer_completion_events(
    request: SteerCompletionRequest, rt: Runtime
) -> AsyncIterator[SteerCompletionResponse]:
    """As `steer_completion`, growing token by token."""
    return _complete(request, rt, stream=True)


async def steer_completion_chat(request: SteerCompletionChatRequest, rt: Runtime) -> SteerCompletionChatResponse:
    """Answered chat per type, in request order. Raises InvalidRequest, UnknownSource, LimitExceeded."""
    return await last(_complete_chat(request, rt, stream=False))


async def steer_completion_chat_events(
    request: SteerCompletionChatRequest, rt: Runtime
) -> AsyncIterator[SteerCompletionChatResponse]:
    """As `steer_completion_chat`, growing token by token."""
    return _complete_chat(request, rt, stream=True)


def _complete(request: SteerCompletionRequest, rt: Runtime, *, stream: bool) -> AsyncIterator[SteerCompletionResponse]:
    """Raises every 4xx before it returns."""
    plan = _checked_plan(request, rt)
    prompt = rt.tokenize(request.prompt, "once")
    completions = _generate(request, prompt, plan, rt, stream=stream)
    return Events(completions, partial(_texts, request))


def _complete_chat(
    request: SteerCompletionChatRequest, rt: Runtime, *, stream: bool
) -> AsyncIterator[SteerCompletionChatResponse]:
    """Raises every 4xx before it returns."""
    plan = _checked_plan(request, rt, skip_special_tokens=not request.steer_special_tokens)
    messages = without_reasoning([ChatMessage(one.role, one.content) for one in request.prompt])
    if not messages:
        raise InvalidRequest("At least one message with content is required")
    rendered, prompt = rt.render_chat(messages)
    chat = NPSteerChatResult(raw=rt.decode(prompt.ids), chat_template=request.prompt)
    completions = _generate(request, prompt, plan, rt, stream=stream)
    return Events(completions, partial(_chats, request, chat, open_reasoning(rendered)))


def _generate(
    request: SteerFields, prompt: Tokens, plan: SteerPlan | None, rt: Runtime, *, stream: bool
) -> AsyncIterator[tuple[Completion, ...]]:
    """One row per requested type, in request order."""
    if not prompt.ids:
        raise InvalidRequest("Prompt is empty")
    sampling = Sampling(
        max_new_tokens=request.n_completion_tokens,
        temperature=request.temperature,
        freq_penalty=request.freq_penalty,
        seed=request.seed,
        n_logprobs=request.n_logprobs or 0,
    )
    plans = [plan if kind == "STEERED" else None for kind in request.types]
    return rt.generate(prompt, plans, sampling, stream=stream)


def _checked_plan(request: SteerFields, rt: Runtime, *, skip_special_tokens: bool = False) -> SteerPlan | None:
    """What STEERED means in this request; None when it names nothing to steer with."""
    check_model(request.model, rt)
    if (request.features is None) == (request.vectors is None):
        raise InvalidRequest(STEER_RULE)
    if len(set(request.types)) < len(request.types):
        raise InvalidRequest("types: each of STEERED and DEFAULT may be given once")
    steers = _steers(request)
    if any(not math.isfinite(steer.coefficient) for steer in steers):
        raise InvalidRequest("strength_multiplier × strength is too large to be a number")
    if not steers:
        return None
    plan = SteerPlan(
        steers=steers,
        method=SteerMethod(request.steer_method),
        normalize=request.normalize_steering,
        skip_special_tokens=skip_special_tokens,
    )
    rt.check_steering(plan)  # also where only DEFAULT is asked for: what is named must exist
    return plan


def _steers(request: SteerFields) -> tuple[Steer, ...]:
    factor = request.strength_multiplier
    by_feature = [SteerFeature(one.source, one.index, factor * one.strength) for one in request.features or ()]
    by_vector = [
        SteerVector(one.hook, tuple(one.steering_vector), factor * one.strength) for one in request.vectors or ()
    ]
    return (*by_feature, *by_vector)


def _texts(request: SteerFields, completions: Sequence[Completion]) -> SteerCompletionResponse:
    return SteerCompletionResponse(
        outputs=[
            NPSteerCompletionOutput(type=kind, output=one.text, logprobs=_logprobs(request, one))
            for kind, one in zip(request.types, completions, strict=True)
        ]
    )


def _chats(
    request: SteerCompletionChatRequest,
    chat: NPSteerChatResult,
    opened: str,
    completions: Sequence[Completion],
) -> SteerCompletionChatResponse:
    return SteerCompletionChatResponse(
        outputs=[
            NPSteerChatResult(
                raw=chat.raw + one.text,
                chat_template=[*chat.chat_template, *_answer(one.text, opened)],
                type=kind,
                logprobs=_logprobs(request, one),
            )
            for kind, one in zip(request.types, completions, strict=True)
        ],
        input=chat,
    )


def _answer(generated: str, opened: str) -> list[NPSteerChatMessage]:
    content = read_answer(generated, opened)
    return [NPSteerChatMessage(role="assistant", content=content)] if content else []


def _logprobs(request: SteerFields, completion: Completion) -> list[NPLogprob] | None:
    return [_logprob(one) for one in completion.logprobs] if request.n_logprobs else None


def _logprob(one: TokenLogprob) -> NPLogprob:
    return NPLogprob(
        token=one.token,
        logprob=_finite(one.logprob),
        top_logprobs=[NPLogprobTop(token=token, logprob=_finite(value)) for token, value in one.top],
    )


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token without probability gets a number that is as good as none."""
    return logprob if math.isfinite(logprob) else NO_PROBABILITY


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
