"""How well a written text holds: how likely the plain model finds it, how much it repeats, how hard it was pushed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Tokens, Written
from neuronpedia_inference.operations.score import likelihoods
from neuronpedia_inference.operations.story import Story, Transcript
from neuronpedia_inference.questions.likelihoods import Likelihoods
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.judge import SteerJudge

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

ENDS_S = 60.0
"""A generation that has told all has this long to end, so that its room is there for what follows."""
GRAM = 3
"""Tokens of which runs are compared."""


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
            await self._story.rest(ENDS_S)
            await judge(self._story, self._rt, reproducible=self._reproducible)
        return news

    async def rest(self, seconds: float) -> None:
        await self._story.rest(seconds)

    async def aclose(self) -> None:
        await self._story.aclose()


async def judge(story: Story, rt: Runtime, *, reproducible: bool) -> None:
    """Every row of a story that has ended is judged; one without any token is not.

    Who began it by a `Completion` with `then` has room for it.
    """
    rows = [row for row in story.rows if row.token_ids]
    texts = [_whole(story.begun.prompt, row) for row in rows]
    question = likelihoods(texts, [len(story.begun.prompt)] * len(rows), rt)
    with reproducibly(reproducible):
        found = await rt.ask(question) if rows else []
    for row, likelihood in zip(rows, found, strict=True):
        doses = [] if row.proof is None else row.proof.doses
        row.judge = SteerJudge(
            logprob_per_token=float(likelihood.logprobs.mean()), repetition=repetition(row.token_ids), dose=doses
        )


def longest(prompt: Tokens, n_rows: int, n_tokens: int, rt: Runtime) -> Likelihoods:
    """What `judge` asks of so many rows of so many new tokens at the most."""
    text = Tokens(
        prompt.ids + prompt.ids[-1:] * n_tokens,
        prompt.strings + prompt.strings[-1:] * n_tokens,
        prompt.is_special + prompt.is_special[-1:] * n_tokens,
        prompt.has_bos,
    )
    return likelihoods([text] * n_rows, [len(prompt)] * n_rows, rt)


def _whole(prompt: Tokens, row: Transcript) -> Tokens:
    """Prompt and text. Which of its tokens are special does not matter to how likely they are."""
    strings = (*prompt.strings, *row.tokens)
    return Tokens((*prompt.ids, *row.token_ids), strings, (False,) * len(strings), prompt.has_bos)
