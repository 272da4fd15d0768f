"""What a generation has said so far."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from neuronpedia_inference.completion import Begun, Completion
from neuronpedia_inference.domain import Refusal, TokenLogprob, Written
from neuronpedia_inference.edits.proof import Proof
from neuronpedia_inference.operations.dosing import Doses
from neuronpedia_inference.operations.growing import GrowingList, GrowingText
from neuronpedia_inference.operations.watching import Watched
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.schemas.judge import SteerJudge
from neuronpedia_inference.schemas.steer import NPLogprob, NPLogprobTop
from neuronpedia_inference.schemas.watch import SteerEvent

LEAST_LOGPROB = -100.0
ENDS_S = 60.0
"""A generation that has told all has this long to end, so that its room is there for what follows."""


class Transcript:
    """One row: its text, and what else is told of it."""

    def __init__(self, prompt: str, *, has_logprobs: bool, keeps_ending: bool = True, has_events: bool = False) -> None:
        """keeps_ending: whether the text ends in the token that stopped it. has_events: whether rules may take back."""
        self.text = GrowingText()
        self.raw = GrowingText(prompt)
        """Prompt and text."""
        self.logprobs = GrowingList(logprob_reply) if has_logprobs else None
        self.tokens = GrowingList[str](lambda token: token)
        """Of the text, without the prompt's."""
        self.token_ids: list[int] = []
        """Those of `tokens`."""
        self.events = GrowingList(event_reply) if has_events else None
        self.watched: Watched | None = None
        self.doses: Doses | None = None
        """Where doses that are too large are told."""
        self.proof: Proof | None = None
        """What its edits did."""
        self.judge: SteerJudge | None = None
        """Once it has ended, where that is asked for."""
        self.finish_reason: str | None = None
        self.rule: int | None = None
        """The one that ended the text at its last token."""
        self._keeps_ending = keeps_ending

    def add(self, written: Written) -> None:
        text = written.text + written.ending if self._keeps_ending else written.text
        self.text.add(text)
        self.raw.add(text)
        if self.logprobs is not None:
            self.logprobs.add(written.logprobs)
        self.tokens.add(written.tokens)
        self.token_ids += written.token_ids
        if self.events is not None:
            self.events.add(written.refusals)
        if self.watched is not None:
            self.watched.add(written)
        if self.doses is not None:
            self.doses.add(written)
        self.finish_reason = written.finish_reason or self.finish_reason
        self.rule = written.rule if written.rule is not None else self.rule


class Story(AsyncIterator[tuple[Written, ...]]):
    """The rows of one generation; every item is what has just been added to them."""

    def __init__(self, wanted: Completion, begun: Begun, rows: Sequence[Transcript]) -> None:
        self.wanted = wanted
        self.begun = begun
        self.rows = rows
        self._source = begun.written

    @property
    def has_ended(self) -> bool:
        return all(row.finish_reason is not None for row in self.rows)

    async def __anext__(self) -> tuple[Written, ...]:
        news = await anext(self._source)
        for row, written in zip(self.rows, news, strict=True):
            row.add(written)
            if row.proof is not None:
                await paced(row.proof.add(written))
        return news

    async def rest(self, seconds: float) -> None:
        await getattr(self._source, "rest", asyncio.sleep)(seconds)

    async def aclose(self) -> None:
        close: Any = getattr(self._source, "aclose", None)
        if close is not None:
            await close()


def event_reply(refusal: Refusal) -> SteerEvent:
    return SteerEvent(rule=refusal.rule, position=refusal.position, n_refused=refusal.n_tokens)


def logprob_reply(one: TokenLogprob) -> NPLogprob:
    """JSON has no infinity: a token without probability gets a number that is as good as none (contract 3.8)."""
    return NPLogprob(
        token=one.token,
        logprob=max(one.logprob, LEAST_LOGPROB),
        top_logprobs=[NPLogprobTop(token=token, logprob=max(value, LEAST_LOGPROB)) for token, value in one.top],
    )
