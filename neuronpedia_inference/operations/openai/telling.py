"""What chats and completions tell alike: tokens, log-probabilities, what was watched, and events in order."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from neuronpedia_inference.domain import TokenLogprob, Written
from neuronpedia_inference.operations.friendly import stopped_by
from neuronpedia_inference.operations.operation import Events
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.operations.story import LEAST_LOGPROB, Transcript
from neuronpedia_inference.schemas.common import Wire
from neuronpedia_inference.schemas.openai_answers import (
    Candidate,
    ChatLogprobs,
    FinishReason,
    Interpretability,
    TokenLogprobs,
    Usage,
)

FRAGMENT = "\ufffd"
Make = Callable[[Sequence[Written]], Iterable[Wire]]


class Spread(Events[Any, Any]):
    """The events that a story's steps give, one by one, and at its end the last ones."""

    def __init__(
        self, steps: AsyncIterator[tuple[Written, ...]], make: Make, last: Callable[[], Iterable[Wire]]
    ) -> None:
        super().__init__(steps, lambda news: news)
        self._make = make
        self._last = last
        self._ready: deque[Wire] = deque()
        self._has_ended = False

    async def __anext__(self) -> Wire:
        while not self._ready:
            if self._has_ended:
                raise StopAsyncIteration
            try:
                self._ready.extend(self._make(await super().__anext__()))
            except StopAsyncIteration:
                self._has_ended = True
                self._ready.extend(self._last())
        return self._ready.popleft()


class Chained(AsyncIterator[Any]):
    """One stream after the other; whatever is left of them is closed together."""

    def __init__(self, streams: Sequence[Events[Any, Any]]) -> None:
        self._streams = deque(streams)

    async def __anext__(self) -> Any:
        while self._streams:
            try:
                return await anext(self._streams[0])
            except StopAsyncIteration:
                await self._streams.popleft().aclose()
        raise StopAsyncIteration

    async def rest(self, seconds: float) -> None:
        if self._streams:
            await self._streams[0].rest(seconds)

    async def aclose(self) -> None:
        for stream in self._streams:
            await stream.aclose()


def finish_of(row: Transcript) -> FinishReason | None:
    """In OpenAI's words: a rule, or a stop string, stops."""
    if row.finish_reason is None:
        return None
    return "length" if row.finish_reason == "length" else "stop"


def interpreted(row: Transcript, *, newest: bool) -> Interpretability | None:
    """newest: only what has been read since the last time."""
    watched = None
    if row.watched is not None:
        watched = row.watched.newest() if newest else row.watched.so_far()
    stop = stopped_by(row)
    judge = None if newest else row.judge
    if watched is None and stop is None and row.events is None and judge is None:
        return None
    return Interpretability.model_construct(watch=watched, stopped_by=stop, events=row.events, judge=judge)


def judged(row: Transcript) -> Interpretability | None:
    """Of a stream, what is told of a text once all have ended."""
    return None if row.judge is None else Interpretability.model_construct(judge=row.judge)


def chat_logprobs(tokens: Sequence[TokenLogprob], n_top: int) -> ChatLogprobs:
    """Made while they are written."""
    return ChatLogprobs.model_construct(
        content=Rows(len(tokens), lambda place: _token(tokens[place], n_top)), refusal=None
    )


def usage(n_prompt: int, rows: Sequence[Transcript]) -> Usage:
    n_new = sum(len(row.tokens) for row in rows)
    return Usage(prompt_tokens=n_prompt, completion_tokens=n_new, total_tokens=n_prompt + n_new)


def least(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, LEAST_LOGPROB)


def _token(one: TokenLogprob, n_top: int) -> TokenLogprobs:
    top = [_candidate(*pair) for pair in one.top[:n_top]]
    return TokenLogprobs(token=one.token, logprob=least(one.logprob), bytes=_bytes(one.token), top_logprobs=top)


def _candidate(token: str, logprob: float) -> Candidate:
    return Candidate(token=token, logprob=least(logprob), bytes=_bytes(token))


def _bytes(token: str) -> list[int] | None:
    return None if FRAGMENT in token else list(token.encode())
