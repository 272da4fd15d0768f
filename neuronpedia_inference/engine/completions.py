"""From decode steps to what a caller reads: new text, token ids, log-probabilities."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from neuronpedia_inference.domain import Numbers, TokenLogprob, Written
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
    ending: str = ""

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
        )


class Completions:
    """The texts of one request's rows. Work for a step does not grow with what was there before it."""

    def __init__(self, codec: TextCodec, n_rows: int) -> None:
        self._codec = codec
        self._streams = [TextStream(codec) for _ in range(n_rows)]

    async def written(self, steps: Sequence[RowStep]) -> tuple[Written, ...]:
        """What these steps have added to every row, in row order."""
        news = [_News() for _ in self._streams]
        pace = Pace()
        for step in steps:
            self._take(step, self._streams[step.row.place], news[step.row.place])
            await pace.give_way()
        return tuple(one.written() for one in news)

    def _take(self, step: RowStep, stream: TextStream, news: _News) -> None:
        if step.token_id != NO_TOKEN:
            news.ids.append(step.token_id)
            news.tokens.append(self._codec.token_string(step.token_id))
            self._say(step, stream, news)
        if step.numbers is not None:
            news.numbers.append(step.numbers)
        if step.ends:
            news.finish_reason, news.rule = step.finish_reason, step.rule
        if step.logprob is not None:
            news.logprobs.append(self._logprob(step, step.logprob))

    def _say(self, step: RowStep, stream: TextStream, news: _News) -> None:
        """The token that stops a row is told apart from its text."""
        if step.finish_reason == "stop":
            news.texts.append(stream.rest())
            news.ending = stream.push(step.token_id) + stream.rest()
            return
        news.texts.append(stream.push(step.token_id))
        if step.finish_reason is not None:
            news.texts.append(stream.rest())

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
