"""How well a written text holds: how likely the plain model finds it, how much it repeats, how hard it was pushed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from neuronpedia_inference.domain import Tokens, Written
from neuronpedia_inference.errors import Overloaded
from neuronpedia_inference.operations.score import likelihoods
from neuronpedia_inference.operations.story import Story, Transcript
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.judge import SteerJudge

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

T = TypeVar("T")

GRAM = 3
"""Tokens of which runs are compared."""
AGAIN_S = 0.05
"""Between two tries of work that goes on with what was admitted."""


def repetition(ids: Sequence[int]) -> float:
    """Share of the runs of three tokens that were there before: 1 − distinct / all, 0 of fewer than three tokens.

    seq-rep-3 of Welleck et al. (2020), Neural Text Generation with Unlikelihood Training, of the text alone.
    """
    runs = [tuple(ids[first : first + GRAM]) for first in range(len(ids) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class Judging(AsyncIterator[tuple[Written, ...]]):
    """A story, whose rows have a `judge` once all have ended: before its last item is told."""

    def __init__(self, story: Story, rt: Runtime, *, reproducible: bool) -> None:
        self._story = story
        self._rt = rt
        self._reproducible = reproducible

    async def __anext__(self) -> tuple[Written, ...]:
        news = await anext(self._story)
        if self._story.has_ended:
            await judge(self._story, self._rt, reproducible=self._reproducible)
        return news

    async def rest(self, seconds: float) -> None:
        await self._story.rest(seconds)

    async def aclose(self) -> None:
        await self._story.aclose()


async def judge(story: Story, rt: Runtime, *, reproducible: bool) -> None:
    """Every row of a story that has ended is judged; one without any token is not.

    Raises Overloaded where there is no room for that within REQUEST_TIMEOUT.
    """
    rows = [row for row in story.rows if row.token_ids]
    texts = [_whole(story.begun.prompt, row) for row in rows]
    question = likelihoods(texts, [len(story.begun.prompt)] * len(rows), rt)
    with reproducibly(reproducible):
        found = await once_there_is_room(lambda: rt.ask(question), rt) if rows else []
    for row, likelihood in zip(rows, found, strict=True):
        doses = [] if row.proof is None else [traced.dose for traced in row.proof.traced]
        row.judge = SteerJudge(
            logprob_per_token=float(likelihood.logprobs.mean()), repetition=repetition(row.token_ids), dose=doses
        )


async def once_there_is_room(attempt: Callable[[], Awaitable[T]], rt: Runtime) -> T:
    """What is done for a request that is inside already: a server that is busy is asked again, while others have their
    turns. Raises Overloaded after REQUEST_TIMEOUT."""
    most_s = rt.settings.request_timeout_s
    until = time.monotonic() + most_s if most_s else float("inf")
    while True:
        try:
            return await attempt()
        except Overloaded:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(AGAIN_S)


def _whole(prompt: Tokens, row: Transcript) -> Tokens:
    """Prompt and text. Which of its tokens are special does not matter to how likely they are."""
    strings = (*prompt.strings, *row.tokens)
    return Tokens((*prompt.ids, *row.token_ids), strings, (False,) * len(strings), prompt.has_bos)
