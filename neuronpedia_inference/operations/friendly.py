"""activations, top_k and steer: the wire operations with defaults and labels, one prompt or several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from neuronpedia_inference.domain import Source, Written
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.activation import activation_all_batch, activation_single_batch
from neuronpedia_inference.operations.operation import Events, Operation, last
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.operations.steer import Chat, chat_story_of, story_of
from neuronpedia_inference.operations.story import Story, Transcript, logprob_reply
from neuronpedia_inference.operations.top_k import activation_topk_by_token_batch
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.activation import (
    ActivationAllBatchRequest,
    ActivationAllFeature,
    ActivationSingleBatchRequest,
    ActivationsRequest,
    ActivationsResponse,
    ActivationsResult,
    ActivationTopkByTokenBatchRequest,
    ActivationTopkByTokenResult,
    LabelledFeature,
    LabelledToken,
    LabelledTopFeature,
    TopKRequest,
    TopKResponse,
    TopKResult,
)
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

T = TypeVar("T")
U = TypeVar("U")


async def activations(request: ActivationsRequest, rt: Runtime) -> ActivationsResponse:
    """Raises InvalidRequest where source or set must be named, and what activation/all or /single raise."""
    with reproducibly(request.reproducible):
        if request.index is None:
            return await _strongest(request, rt)
        return await _one_feature(request, request.index, rt)


async def top_k(request: TopKRequest, rt: Runtime) -> TopKResponse:
    """Raises InvalidRequest where the source must be named, and what activation/topk-by-token raises."""
    source = _choose_source(request.source, rt.shelf.sources)
    wire = ActivationTopkByTokenBatchRequest(
        prompts=_prompts(request.prompt),
        model=request.model or rt.model.id,
        source=source,
        top_k=request.top_k,
        ignore_bos=request.ignore_bos,
    )
    with reproducibly(request.reproducible):
        answer = await activation_topk_by_token_batch(wire, rt)
    return TopKResponse.model_construct(
        results=[
            TopKResult.model_construct(
                source=source,
                tokens=result.tokens,
                positions=_each(result.results, lambda one: _labelled_token(one, source, rt)),
            )
            for result in answer.results
        ]
    )


async def steer(request: SteerRequest, rt: Runtime) -> SteerResponse:
    """Raises what steer/completion and steer/completion-chat raise."""
    return await last(await _steered(request, rt, stream=False))


async def steer_events(request: SteerRequest, rt: Runtime) -> AsyncIterator[SteerResponse]:
    """As `steer`, growing token by token; with `deltas` only what is new."""
    return await _steered(request, rt, stream=True)


def _prompts(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt


def _choose_source(named: str | None, candidates: Sequence[Source]) -> str:
    """The source named, or the only one there is."""
    if named is not None:
        return named
    if len(candidates) == 1:
        return candidates[0].name
    names = ", ".join(source.name for source in candidates[:12]) or "none"
    raise InvalidRequest(f"source: name one, there is not exactly one to choose. Available: {names}")


def _choose_set(request: ActivationsRequest, rt: Runtime) -> tuple[str, list[str]]:
    """Source set and the sources selected from it; no source means all of the set."""
    if request.source is not None:
        return request.source_set or rt.shelf.source(request.source).source_set, [request.source]
    if request.source_set is not None:
        return request.source_set, []
    if len(rt.shelf.source_sets) == 1:
        return rt.shelf.source_sets[0], []
    names = ", ".join(rt.shelf.source_sets[:12]) or "none"
    raise InvalidRequest(f"source_set: name one, there is not exactly one to choose. Available: {names}")


async def _strongest(request: ActivationsRequest, rt: Runtime) -> ActivationsResponse:
    source_set, selected = _choose_set(request, rt)
    most, wanted = rt.settings.max_results, request.num_results
    if "num_results" in request.model_fields_set and wanted is not None and wanted > most:
        raise LimitExceeded(f"num_results is {wanted}, the most is {most}. Ask for fewer or raise MAX_RESULTS.")
    wire = ActivationAllBatchRequest(
        prompts=_prompts(request.prompt),
        model=request.model or rt.model.id,
        source_set=source_set,
        selected_sources=selected,
        sort_by_token_indexes=[],
        ignore_bos=request.ignore_bos,
        num_results=request.num_results,
    )
    answer = await activation_all_batch(wire, rt)
    return ActivationsResponse.model_construct(
        results=[
            ActivationsResult.model_construct(
                tokens=result.tokens, features=_each(result.activations, lambda one: _labelled(one, rt))
            )
            for result in answer.results
        ]
    )


async def _one_feature(request: ActivationsRequest, index: int, rt: Runtime) -> ActivationsResponse:
    if not request.ignore_bos:
        raise InvalidRequest("ignore_bos: must be true with index, whose values never include a BOS token")
    candidates = rt.shelf.sources if request.source_set is None else rt.shelf.source_set(request.source_set)
    source = _choose_source(request.source, candidates)
    wire = ActivationSingleBatchRequest(
        prompts=_prompts(request.prompt), model=request.model or rt.model.id, source=source, index=str(index)
    )
    answer = await activation_single_batch(wire, rt)
    label = rt.shelf.label(source, index)
    return ActivationsResponse(
        results=[
            ActivationsResult(
                tokens=result.tokens,
                features=[LabelledFeature(source=source, index=index, label=label, **result.activation.model_dump())],
            )
            for result in answer.results
        ]
    )


def _each(items: Sequence[T], turn: Callable[[T], U]) -> Rows[U]:
    """`turn` of every item, made when it is asked for."""
    return Rows(len(items), lambda place: turn(items[place]))


def _labelled(one: ActivationAllFeature, rt: Runtime) -> LabelledFeature:
    fields = {name: value for name, value in one.__dict__.items() if name != "sum_values"}
    return LabelledFeature(**fields, label=rt.shelf.label(one.source, one.index))


def _labelled_token(one: ActivationTopkByTokenResult, source: str, rt: Runtime) -> LabelledToken:
    return LabelledToken(
        token_position=one.token_position,
        token=one.token,
        is_special=one.is_special,
        top_features=[
            LabelledTopFeature(**top.__dict__, label=rt.shelf.label(source, top.feature_index))
            for top in one.top_features
        ],
    )


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
            source=_choose_source(one.source, rt.shelf.sources),
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
    wire = _steer_wire(request, rt)
    with reproducibly(request.reproducible):
        if isinstance(wire, SteerCompletionRequest):
            chat, story = None, await story_of(wire, rt, stream=stream)
        else:
            chat, story = await chat_story_of(wire, rt, stream=stream)
    if request.deltas:
        return Events(story, lambda news: _side_by_side([_new(chat, story, *pair) for pair in enumerate(news)]))
    return Events(story, lambda _: _side_by_side([_so_far(chat, row) for row in story.rows]))


def _so_far(chat: Chat | None, row: Transcript) -> SteerText:
    return SteerText.model_construct(
        text=row.text,
        messages=None if chat is None else chat.with_answer(row),
        logprobs=row.logprobs,
        finish_reason=row.finish_reason,
    )


def _new(chat: Chat | None, story: Story, place: int, written: Written) -> SteerText:
    """Messages come with the last event: they cannot be told in parts."""
    row = story.rows[place]
    return SteerText.model_construct(
        text=written.text,
        messages=None if chat is None or not story.has_ended else chat.with_answer(row),
        logprobs=None if row.logprobs is None else [logprob_reply(one) for one in written.logprobs],
        finish_reason=row.finish_reason,
    )


def _side_by_side(texts: Sequence[SteerText]) -> SteerResponse:
    """Texts in the order that `_steer_wire` asks for."""
    return SteerResponse.model_construct(steered=texts[0], default=texts[1] if len(texts) > 1 else None)


ACTIVATIONS = Operation(
    name="activations",
    path="/v1/activations",
    request=ActivationsRequest,
    response=ActivationsResponse,
    summary="Labelled features on one prompt or several: the strongest, or one by its index",
    run=activations,
)
TOP_K = Operation(
    name="top_k",
    path="/v1/top-k",
    request=TopKRequest,
    response=TopKResponse,
    summary="Labelled strongest features at each token of one prompt or several",
    run=top_k,
)
STEER = Operation(
    name="steer",
    path="/v1/steer",
    request=SteerRequest,
    response=SteerResponse,
    summary="Steer a text or a chat and compare with the unsteered answer",
    run=steer,
    stream=steer_events,
)
