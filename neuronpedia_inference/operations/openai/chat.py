"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.domain import ChatMessage, TokenLogprob, Tokens, Written
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.openai.asking import (
    AT_THE_ADDRESS,
    Heading,
    Writing,
    begun,
    model_id,
    sampling_of,
    steered,
    variant_of,
)
from neuronpedia_inference.operations.openai.reading import IN_HARMONY, Reader, Said, read, reader_of
from neuronpedia_inference.operations.openai.telling import Spread, chat_logprobs, finish_of, interpreted, judged, usage
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.story import Transcript
from neuronpedia_inference.schemas.common import Wire
from neuronpedia_inference.schemas.openai import DEFAULT_CHAT_TOKENS, ChatCompletionRequest, ChatTurn
from neuronpedia_inference.schemas.openai_answers import (
    Accounted,
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
    Delta,
    Usage,
)

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

NAME = "chat_completions"
READ_BY_SOME = ("name", "reasoning_content", "tool_call_id", "tool_calls")
"""Of a message, what a template may not read."""


async def chat_completions(request: ChatCompletionRequest, rt: Runtime) -> ChatCompletionResponse:
    """Raises InvalidRequest, UnknownModel, UnknownSource, UnknownPoint, LimitExceeded."""
    chat = await _begun(request, rt, stream=False)
    async with aclosing(chat.writing.story):
        async for news in chat.writing.steps:
            chat.add(news)
    return chat.response()


async def chat_completion_chunks(request: ChatCompletionRequest, rt: Runtime) -> AsyncIterator[Wire]:
    """As `chat_completions`, in what is new. Raises the same before it returns."""
    chat = await _begun(request, rt, stream=True)
    return Spread(chat.writing.steps, chat.chunks, chat.last)


class _Answer:
    """One answer, as it is written."""

    def __init__(self, row: Transcript, reader: Reader) -> None:
        self.row = row
        self.whole = Said()
        self.logprobs: list[TokenLogprob] = []
        self._reader = reader

    def add(self, written: Written) -> Said:
        """What is new."""
        read(self._reader, written.text, written.special)
        if written.finish_reason is not None:
            self._reader.end()
        news = self._reader.said.taken()
        self.whole.reasoning += news.reasoning
        self.whole.content += news.content
        self.logprobs += written.logprobs
        return news


class _Chat:
    """The answers to one request."""

    def __init__(
        self, request: ChatCompletionRequest, model: str, prompt: Tokens, writing: Writing, readers: Any
    ) -> None:
        """readers: one per row of the story."""
        self.writing = writing
        self._request = request
        self._heading = Heading(model, "chatcmpl")
        self._n_prompt = len(prompt)
        self._answers = [_Answer(row, reader) for row, reader in zip(writing.story.rows, readers, strict=True)]
        self._has_begun = False

    def add(self, news: Sequence[Written]) -> list[Said]:
        return [answer.add(written) for answer, written in zip(self._answers, news, strict=True)]

    def chunks(self, news: Sequence[Written]) -> Iterable[ChatCompletionChunk]:
        """Who speaks, then what is new in each answer, and behind its last piece why it ended."""
        if not self._has_begun:
            self._has_begun = True
            for index in range(len(self._answers)):
                yield self._event([_choice(index, Delta(role="assistant", content=""))])
        for index, (said, written) in enumerate(zip(self.add(news), news, strict=True)):
            yield from self._news(index, said, written)

    def last(self) -> Iterable[ChatCompletionChunk]:
        """How well each answer holds, the receipt, and the event that counts the tokens, where they are asked for."""
        for index, row in enumerate(self.writing.story.rows):
            if row.judge is not None:
                yield self._event([_choice(index, Delta(), interpretability=judged(row))])
        accounted = self.writing.accounted
        if accounted is not None:
            yield self._event([], accounted=accounted)
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield self._event([], usage(self._n_prompt, self.writing.story.rows))

    def response(self) -> ChatCompletionResponse:
        return ChatCompletionResponse.model_construct(
            id=self._heading.id,
            object="chat.completion",
            created=self._heading.created,
            model=self._heading.model,
            choices=[self._whole(index, answer) for index, answer in enumerate(self._answers)],
            usage=usage(self._n_prompt, self.writing.story.rows),
            interpretability=self.writing.accounted,
        )

    def _news(self, index: int, said: Said, written: Written) -> Iterable[ChatCompletionChunk]:
        row = self._answers[index].row
        has_numbers = row.watched is not None and written.numbers is not None
        told = interpreted(row, newest=True) if has_numbers or written.rule is not None else None
        logprobs = self._logprobs(written.logprobs) if written.logprobs else None
        if said.reasoning or said.content or logprobs or told:
            delta = Delta(content=said.content or None, reasoning_content=said.reasoning or None)
            yield self._event([_choice(index, delta, logprobs=logprobs, interpretability=told)])
        if written.finish_reason is not None:
            yield self._event([_choice(index, Delta(), finish_reason=finish_of(row))])

    def _whole(self, index: int, answer: _Answer) -> ChatChoice:
        said = answer.whole
        return ChatChoice.model_construct(
            index=index,
            message=AnswerMessage(role="assistant", content=said.content, reasoning_content=said.reasoning or None),
            logprobs=self._logprobs(answer.logprobs) if self._request.logprobs else None,
            finish_reason=finish_of(answer.row),
            interpretability=interpreted(answer.row, newest=False),
        )

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
        return chat_logprobs(tokens, self._request.top_logprobs or 0)

    def _event(
        self, choices: list[ChatChunkChoice], counted: Usage | None = None, accounted: Accounted | None = None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk.model_construct(
            id=self._heading.id,
            object="chat.completion.chunk",
            created=self._heading.created,
            model=self._heading.model,
            choices=choices,
            usage=counted,
            interpretability=accounted,
        )


def _choice(index: int, delta: Delta, **rest: Any) -> ChatChunkChoice:
    given: dict[str, Any] = {"logprobs": None, "finish_reason": None, "interpretability": None, **rest}
    return ChatChunkChoice.model_construct(index=index, delta=delta, **given)


async def _begun(request: ChatCompletionRequest, rt: Runtime, *, stream: bool) -> _Chat:
    """Raises every 4xx and 503 before it returns."""
    variant = variant_of(request.model, rt)
    plan = steered(request, variant, rt, skip_special_tokens=not request.steer_special_tokens)
    rendered, prompt = rt.render_chat(
        _messages(request.messages, rt), continues=request.continue_final_message, options=_options(request, rt)
    )
    asked = request.max_tokens or request.max_completion_tokens
    sampling = sampling_of(
        request,
        rt,
        max_new_tokens=asked or max(1, min(DEFAULT_CHAT_TOKENS, rt.max_tokens - len(prompt))),
        n_logprobs=max(1, request.top_logprobs or 0) if request.logprobs else 0,
    )
    writing = await begun(NAME, prompt, request, plan, sampling, rt, stream=stream)
    is_harmony = all(map(rt.template_names, IN_HARMONY))
    readers = [reader_of(rendered, is_harmony=is_harmony) for _ in writing.story.rows]
    return _Chat(request, model_id(variant, rt), prompt, writing, readers)


def _options(request: ChatCompletionRequest, rt: Runtime) -> dict[str, Any]:
    """What the template is given beside the messages. Raises InvalidRequest for what it does not read."""
    options = dict(request.chat_template_kwargs or {})
    if request.tools and request.tool_choice != "none":
        options["tools"] = request.tools
    if request.reasoning_effort is not None:
        options["reasoning_effort"] = request.reasoning_effort
    for name in options:
        if not rt.template_names(name):
            raise InvalidRequest(f"{name[:80]}: the model's chat template does not read it. Leave it out.")
    return options


def _messages(turns: Sequence[ChatTurn], rt: Runtime) -> list[ChatMessage]:
    """Raises InvalidRequest."""
    return [_message(turn, f"messages.{place}", rt) for place, turn in enumerate(turns)]


def _message(turn: ChatTurn, where: str, rt: Runtime) -> ChatMessage:
    more = {name: given for name in READ_BY_SOME if (given := getattr(turn, name)) is not None}
    for name in more:
        if not rt.template_names(name):
            raise InvalidRequest(f"{where}.{name}: the model's chat template does not read it. Leave it out.")
    if turn.tool_calls is not None:
        more["tool_calls"] = [_call(one) for one in turn.tool_calls]
    elif turn.content is None:
        raise InvalidRequest(f"{where}.content: there is none. Send a text, which may be empty.")
    content = turn.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    return ChatMessage(turn.role, text, more=more)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """With its arguments as an object, which templates want, where OpenAI has the text of one."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


CHAT_COMPLETIONS = Operation(
    name=NAME,
    path="/v1/chat/completions",
    request=ChatCompletionRequest,
    response=ChatCompletionResponse,
    summary="Answer a chat, steered, in OpenAI's shapes",
    run=chat_completions,
    stream=chat_completion_chunks,
    dialect="openai",
    off_modal_because=AT_THE_ADDRESS,
)
