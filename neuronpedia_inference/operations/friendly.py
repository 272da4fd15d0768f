"""steer: the wire's two completions as one, with defaults, steered and unsteered side by side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Written
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.operation import Events, Operation, last
from neuronpedia_inference.operations.prompts import choose_source
from neuronpedia_inference.operations.steer import Chat, chat_story_of, story_of
from neuronpedia_inference.operations.story import Story, Transcript, logprob_reply
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.steer import (
    NPSteerFeature,
    NPSteerVector,
    SteerCompletionChatRequest,
    SteerCompletionRequest,
    SteerRequest,
    SteerResponse,
    SteerText,
)

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def steer(request: SteerRequest, rt: Runtime) -> SteerResponse:
    """Raises what steer/completion and steer/completion-chat raise."""
    return await last(await _steered(request, rt, stream=False))


async def steer_events(request: SteerRequest, rt: Runtime) -> AsyncIterator[SteerResponse]:
    """As `steer`, growing token by token; with `deltas` only what is new."""
    return await _steered(request, rt, stream=True)


def _steer_wire(request: SteerRequest, rt: Runtime) -> SteerCompletionRequest | SteerCompletionChatRequest:
    """The wire request that means the same: STEERED, and DEFAULT to compare."""
    fields = partial(
        dict,
        model=request.model or rt.model.id,
        steer_method=request.method,
        normalize_steering=False,
        types=["STEERED", "DEFAULT"] if request.compare else ["STEERED"],
        features=_steer_features(request, rt),
        vectors=_steer_vectors(request),
        n_completion_tokens=request.max_new_tokens,
        temperature=request.temperature,
        strength_multiplier=request.strength_multiplier,
        freq_penalty=request.freq_penalty,
        seed=request.seed,
        n_logprobs=request.n_logprobs,
    )
    if isinstance(request.prompt, str):
        if not request.prompt:
            raise InvalidRequest(
                "prompt: the text is empty, so there is nothing to go on from. Send at least one character; the BOS "
                "token of the model, as text, begins from nothing."
            )
        return SteerCompletionRequest(**fields(prompt=request.prompt))
    return SteerCompletionChatRequest(
        **fields(prompt=request.prompt, steer_special_tokens=request.steer_special_tokens)
    )


def _steer_features(request: SteerRequest, rt: Runtime) -> list[NPSteerFeature] | None:
    if request.features is None:
        return None
    return [
        NPSteerFeature(
            model=rt.model.id,
            source=choose_source(one.source, rt.shelf.sources),
            index=one.index,
            strength=one.strength,
        )
        for one in request.features
    ]


def _steer_vectors(request: SteerRequest) -> list[NPSteerVector] | None:
    if request.vectors is None:
        return None
    # They have been checked: millions of numbers are not looked at again.
    return [
        NPSteerVector.model_construct(steering_vector=one.vector, strength=one.strength, hook=one.hook)
        for one in request.vectors
    ]


async def _steered(request: SteerRequest, rt: Runtime, *, stream: bool) -> AsyncIterator[SteerResponse]:
    """Raises every 4xx before it returns."""
    if request.deltas and not stream:
        raise InvalidRequest("deltas: goes with stream, whose events it makes smaller")
    wire, watch = _steer_wire(request, rt), request.watch or ()
    with reproducibly(request.reproducible):
        if isinstance(wire, SteerCompletionRequest):
            chat, story = None, await story_of(wire, rt, stream=stream, keeps_ending=False, watch=watch)
        else:
            chat, story = await chat_story_of(wire, rt, stream=stream, keeps_ending=False, watch=watch)
    if request.deltas:
        return Events(story, lambda news: _side_by_side([_new(chat, story, *pair) for pair in enumerate(news)]))
    return Events(story, lambda _: _side_by_side([_so_far(chat, row) for row in story.rows]))


def _so_far(chat: Chat | None, row: Transcript) -> SteerText:
    return SteerText.model_construct(
        text=row.text,
        messages=None if chat is None else chat.with_answer(row),
        tokens=row.tokens,
        logprobs=row.logprobs,
        finish_reason=row.finish_reason,
        watch=None if row.watched is None else row.watched.so_far(),
    )


def _new(chat: Chat | None, story: Story, place: int, written: Written) -> SteerText:
    """Messages come with the last event: they cannot be told in parts."""
    row = story.rows[place]
    return SteerText.model_construct(
        text=written.text,
        messages=None if chat is None or not story.has_ended else chat.with_answer(row),
        tokens=list(written.tokens),
        logprobs=None if row.logprobs is None else [logprob_reply(one) for one in written.logprobs],
        finish_reason=row.finish_reason,
        watch=None if row.watched is None else row.watched.newest(),
    )


def _side_by_side(texts: Sequence[SteerText]) -> SteerResponse:
    """Texts in the order that `_steer_wire` asks for."""
    return SteerResponse.model_construct(steered=texts[0], default=texts[1] if len(texts) > 1 else None)


STEER = Operation(
    name="steer",
    path="/v1/steer",
    request=SteerRequest,
    response=SteerResponse,
    summary="Steer a text or a chat and compare with the unsteered answer",
    run=steer,
    stream=steer_events,
)
