"""How well a written text holds: how likely the plain model finds it, how much it repeats, how hard it was pushed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Numbers, Tokens, Written
from neuronpedia_inference.edits.plan import Feature
from neuronpedia_inference.operations.score import likelihoods
from neuronpedia_inference.operations.story import ENDS_S, Story, Transcript
from neuronpedia_inference.questions import OneFeature
from neuronpedia_inference.questions.together import Together
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.judge import SteerJudge

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

Effects = list[float]

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


async def judge(story: Story, rt: Runtime, *, reproducible: bool, features: Sequence[Feature] = ()) -> list[Effects]:
    """Every row of a story that has ended is judged; one without any token is not.

    Who began it by a `Completion` with `then` has room for it.

    -> of every row the mean activation of each of the features over its tokens but the last, by the unsteered model.
    """
    rows = [row for row in story.rows if row.token_ids]
    if not rows:
        return [[0.0] * len(features) for _ in story.rows]
    n_given = len(story.begun.prompt)
    texts = [_whole(story.begun.prompt, row) for row in rows]
    with reproducibly(reproducible):
        found, *activations = await rt.ask(judging(texts, n_given, features, rt))
    effects: dict[int, Effects] = {}
    for place, (row, likelihood) in enumerate(zip(rows, found, strict=True)):
        effects[id(row)] = [_mean(one[place].values[n_given:]) for one in activations]
        doses = [] if row.proof is None else row.proof.doses
        row.judge = SteerJudge(
            logprob_per_token=float(likelihood.logprobs.mean()), repetition=repetition(row.token_ids), dose=doses
        )
    return [effects.get(id(row), [0.0] * len(features)) for row in story.rows]


def judging(texts: Sequence[Tokens], n_given: int, features: Sequence[Feature], rt: Runtime) -> Together:
    """The likelihood of all behind the tokens given, and each feature where the model runs them."""
    scored = likelihoods(texts, [n_given] * len(texts), rt)
    sources = [replace(rt.shelf.source(one.source), has_dfa=False) for one in features]
    read = [OneFeature(scored.prompts, source, one.index) for source, one in zip(sources, features, strict=True)]
    return Together([scored, *read])


def _mean(numbers: Numbers) -> float:
    return float(numbers.mean()) if len(numbers) else 0.0


def longest(prompt: Tokens, n_rows: int, n_tokens: int, rt: Runtime, features: Sequence[Feature] = ()) -> Together:
    """What `judge` asks of so many rows of so many new tokens at the most."""
    text = prompt.longer(n_tokens)
    return judging([text] * n_rows, len(prompt), features, rt)


def _whole(prompt: Tokens, row: Transcript) -> Tokens:
    """Prompt and text. Which of its tokens are special does not matter to how likely they are."""
    strings = (*prompt.strings, *row.tokens)
    return Tokens((*prompt.ids, *row.token_ids), strings, (False,) * len(strings), prompt.has_bos)
