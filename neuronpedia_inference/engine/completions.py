"""From decode steps to what a caller reads: new text, token ids, log-probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from neuronpedia_inference.cuts import Cut
from neuronpedia_inference.domain import Numbers, Refusal, TokenLogprob, Written
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowStep
from neuronpedia_inference.engine.tokens import TextCodec, TextStream
from neuronpedia_inference.pacing import Pace


@dataclass
class _News:
    """What a row has gained in the steps at hand."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    numbers: list[Numbers] = field(default_factory=list)
    rule: int | None = None
    refusals: list[Refusal] = field(default_factory=list)
    ending: str = ""
    special: list[tuple[int, int]] = field(default_factory=list)
    n_characters: int = 0

    def written(self) -> Written:
        return Written(
            "".join(self.texts),
            tuple(self.ids),
            tuple(self.logprobs),
            self.finish_reason,
            tuple(self.tokens),
            np.concatenate(self.numbers) if self.numbers else None,
            self.ending,
            rule=self.rule,
            refusals=tuple(self.refusals),
            special=tuple(self.special),
        )


class _Text:
    """What one row says: its characters, and log-probabilities of the tokens that lie in them."""

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self._codec = codec
        self._stream = TextStream(codec)
        self._cut = Cut(stop)
        self._n_said = 0
        self._n_read = 0
        self._held: deque[tuple[int, TokenLogprob]] = deque()
        """With the length of the text behind each."""
        self._special: deque[tuple[int, int]] = deque()
        """Where special tokens lie in the text, as far as it is not said."""

    def push(self, token_id: int, news: _News) -> None:
        text = self._stream.push(token_id)
        name = self._codec.token_string(token_id)
        if self._codec.is_special(token_id) and text.endswith(name):
            end = self._n_read + len(text)
            self._special.append((end - len(name), end))
        self._read(text, news)

    def hold(self, logprob: TokenLogprob) -> None:
        """Of the token that was pushed last."""
        self._held.append((self._n_read, logprob))

    def told(self) -> Iterator[TokenLogprob]:
        """What lies in the text that has been said. Of a token of which a stop string took a part nothing is told."""
        while self._held and self._held[0][0] <= self._n_said:
            yield self._held.popleft()[1]

    def end(self, news: _News) -> None:
        """Say what was held back, if it has not been said."""
        self._read(self._stream.rest(), news)
        self._say(self._cut.rest(), news)

    def ending(self, token_id: int) -> str:
        return self._stream.push(token_id) + self._stream.rest()

    def _read(self, text: str, news: _News) -> None:
        self._n_read += len(text)
        self._say(self._cut.push(text), news)

    def _say(self, text: str, news: _News) -> None:
        start, self._n_said = self._n_said, self._n_said + len(text)
        place = news.n_characters - start
        while self._special and self._special[0][0] < self._n_said:
            first, last = self._special[0]
            news.special.append((max(first, start) + place, min(last, self._n_said) + place))
            if last > self._n_said:
                break
            self._special.popleft()
        news.texts.append(text)
        news.n_characters += len(text)


class Completions:
    """The texts of one request's rows. Work for a step does not grow with what was there before it."""

    def __init__(self, codec: TextCodec, n_rows: int, stop: Sequence[str] = ()) -> None:
        """stop: strings at which texts end, and which are no part of them."""
        self._codec = codec
        self._texts = [_Text(codec, stop) for _ in range(n_rows)]

    async def written(self, steps: Sequence[RowStep]) -> tuple[Written, ...]:
        """What these steps have added to every row, in row order."""
        news = [_News() for _ in self._texts]
        pace = Pace()
        for step in steps:
            self._take(step, self._texts[step.row.place], news[step.row.place])
            await pace.give_way()
        return tuple(one.written() for one in news)

    def _take(self, step: RowStep, text: _Text, news: _News) -> None:
        if step.numbers is not None:
            news.numbers.append(step.numbers)
        if step.token_id != NO_TOKEN:
            news.ids.append(step.token_id)
            news.tokens.append(self._codec.token_string(step.token_id))
            self._say(step, text, news)
        if step.refusal is not None:
            news.refusals.append(step.refusal)
        if step.ends:
            text.end(news)
            news.finish_reason, news.rule = step.finish_reason, step.rule
        news.logprobs.extend(text.told())

    def _say(self, step: RowStep, text: _Text, news: _News) -> None:
        """The token that stops a row is told apart from its text."""
        if step.finish_reason != "stop":
            text.push(step.token_id, news)
        if step.logprob is not None:
            text.hold(self._logprob(step, step.logprob))
        if step.finish_reason is None:
            return
        text.end(news)
        if step.finish_reason == "stop":
            news.ending = text.ending(step.token_id)

    def _logprob(self, step: RowStep, logprob: float) -> TokenLogprob:
        name = self._codec.token_string
        return TokenLogprob(name(step.token_id), logprob, tuple((name(i), value) for i, value in step.top))


class StepEvents(Protocol):
    """Decode steps as they come."""

    async def __anext__(self) -> list[RowStep]: ...

    async def rest(self, seconds: float) -> None: ...

    async def aclose(self) -> None: ...


class Writing(AsyncIterator[tuple[Written, ...]]):
    """Decode steps as text, on the reader's event loop."""

    def __init__(self, events: StepEvents, completions: Completions) -> None:
        self._events = events
        self._completions = completions

    async def __anext__(self) -> tuple[Written, ...]:
        return await self._completions.written(await self._events.__anext__())

    async def rest(self, seconds: float) -> None:
        """Leave the work alone for so long, or until it has ended."""
        await self._events.rest(seconds)

    async def aclose(self) -> None:
        """Stop the work; no effect once it has ended."""
        await self._events.aclose()
