"""Several questions about the same prompts, answered from one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuronpedia_inference.domain import Tokens
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.points import Point
from neuronpedia_inference.questions.features import Steps
from neuronpedia_inference.questions.question import Places, Question, Weights


@dataclass(frozen=True)
class Together:
    """Answers in the order of the questions, whose prompts are equal."""

    questions: Sequence[Question[Any]]

    @property
    def prompts(self) -> Sequence[Tokens]:
        return self.questions[0].prompts

    @property
    def points(self) -> set[Point]:
        return {point for one in self.questions for point in one.points}

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.questions)

    def check(self, places: Places, vocab_size: int) -> None:
        for one in self.questions:
            one.check(places, vocab_size)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[Any]]:
        answers: list[Any] = []
        for one in self.questions:
            answers.append((yield from one.reduce(captured, weights)))
        return answers
