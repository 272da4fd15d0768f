"""steer: a text or a chat, edited by features and vectors, beside the same unedited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from neuronpedia_inference.completion import Completion
from neuronpedia_inference.domain import Sampling, Written
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.edits import plan_of, skips_special_tokens
from neuronpedia_inference.operations.judging import Judging, longest
from neuronpedia_inference.operations.operation import Events, Operation, last
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.operations.receipts import Account
from neuronpedia_inference.operations.steer import Chat, chat_story, text_story, turns
from neuronpedia_inference.operations.story import Story, Transcript, event_reply, logprob_reply
from neuronpedia_inference.operations.watching import watch_plan
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.steer import SteerRequest, SteerResponse, SteerText
from neuronpedia_inference.schemas.watch import SteerStop

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def steer(request: SteerRequest, rt: Runtime) -> SteerResponse:
    """Raises InvalidRequest, UnknownSource, UnknownPoint, LimitExceeded."""
    return await last(await _steered(request, rt, stream=False))


async def steer_events(request: SteerRequest, rt: Runtime) -> AsyncIterator[SteerResponse]:
    """As `steer`, growing token by token; with `deltas` only what is new."""
    return await _steered(request, rt, stream=True)


async def _steered(request: SteerRequest, rt: Runtime, *, stream: bool) -> AsyncIterator[SteerResponse]:
    """Raises every 4xx before it returns."""
    if request.deltas and not stream:
        raise InvalidRequest("deltas: goes with stream, whose events it makes smaller")
    if request.prompt == "":
        raise InvalidRequest(
            "prompt: the text is empty, so there is nothing to go on from. Send at least one character; the BOS "
            "token of the model, as text, begins from nothing."
        )
    watch = request.watch or ()
    wanted = _wanted(request, rt)
    with reproducibly(request.reproducible):
        if isinstance(request.prompt, str):
            chat, story = None, await text_story(wanted, rt, stream=stream, keeps_ending=False, watch=watch)
        else:
            chat, story = await chat_story(request.prompt, wanted, rt, stream=stream, keeps_ending=False, watch=watch)
    account = await Account.of(STEER.name, request, story, rt) if request.receipt else None
    source = Judging(story, rt, reproducible=request.reproducible) if request.judge else story
    if request.deltas:
        return Events(
            source, lambda news: _side_by_side([_new(chat, story, *pair) for pair in enumerate(news)], account)
        )
    return Events(source, lambda _: _side_by_side([_so_far(chat, row) for row in story.rows], account))


def _wanted(request: SteerRequest, rt: Runtime) -> Completion:
    """Steered, and unsteered to compare."""
    if request.model is not None:
        check_model(request.model, rt)
    skips = skips_special_tokens(request, is_chat=not isinstance(request.prompt, str))
    plan = plan_of(request, rt, skip_special_tokens=skips, can_warn=True)
    plans = [plan, *([None] if request.compare else [])]
    return Completion(
        request.prompt if isinstance(request.prompt, str) else turns(request.prompt),
        plans,
        _sampling(request),
        reads=watch_plan(request.watch or (), request.rules or (), rt, tells_edits=plan is not None and plan.warns),
        proves=request.receipt or request.judge,
        then=(lambda prompt: longest(prompt, len(plans), request.max_new_tokens, rt)) if request.judge else None,
    )


def _sampling(request: SteerRequest) -> Sampling:
    return Sampling(
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        freq_penalty=request.freq_penalty,
        seed=request.seed,
        n_logprobs=request.n_logprobs or 0,
    )


def _so_far(chat: Chat | None, row: Transcript) -> SteerText:
    return SteerText.model_construct(
        text=row.text,
        messages=None if chat is None else chat.with_answer(row),
        tokens=row.tokens,
        logprobs=row.logprobs,
        finish_reason=row.finish_reason,
        watch=None if row.watched is None else row.watched.so_far(),
        stopped_by=stopped_by(row),
        judge=row.judge,
        events=row.events,
        over_dose=None if row.doses is None else row.doses.over,
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
        stopped_by=stopped_by(row),
        judge=row.judge,
        events=None if row.events is None else [event_reply(one) for one in written.refusals],
        over_dose=None if row.doses is None else row.doses.over,
    )


def stopped_by(row: Transcript) -> SteerStop | None:
    """The rule that ended a text."""
    if row.rule is None:
        return None
    last = len(row.tokens) - 1
    return SteerStop(rule=row.rule, position=last, token=row.tokens[last])


def _side_by_side(texts: Sequence[SteerText], account: Account | None) -> SteerResponse:
    """Texts in the order of the plans."""
    return SteerResponse.model_construct(
        steered=texts[0],
        default=texts[1] if len(texts) > 1 else None,
        receipt=None if account is None else account.receipt(),
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
