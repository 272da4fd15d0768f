"""What is asked of a model that is to go on with a text, and what it begins with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.domain import ChatMessage, Sampling, Tokens, Written
from neuronpedia_inference.edits.plan import Plan
from neuronpedia_inference.edits.proof import ResolvedEdit
from neuronpedia_inference.points import Point
from neuronpedia_inference.watches.rules import RulePlan

if TYPE_CHECKING:
    from neuronpedia_inference.questions import Question


@dataclass(frozen=True)
class Completion:
    """A text or a chat to be gone on with, once for every plan, all in one batch."""

    prompt: str | Sequence[ChatMessage] | Tokens
    plans: Sequence[Plan | None]
    """One per row, in order; None goes on unsteered."""
    sampling: Sampling
    seeds: Sequence[int] | None = None
    """By row, where they differ from the sampling's."""
    reads: RulePlan | None = None
    """What is watched in every row, twice where that row is steered, and what ends it early."""
    proves: bool = False
    """Whether what edits do is read, behind what is watched: the numbers of `edits.proof`."""
    then: Callable[[Tokens], Question[Any]] | None = None
    """Of the prompt: what will be asked at the most once all is written. It has to have room before anything runs."""
    named: Plan | None = None
    """Has to be possible too, whether or not a row is steered by it."""


@dataclass(frozen=True)
class Begun:
    """A completion that was checked and admitted."""

    prompt: Tokens
    rendered: str
    """A chat as its template gives it; empty for a text."""
    edited: Sequence[Collection[Point]]
    """By row, where it is steered."""
    written: AsyncIterator[tuple[Written, ...]]
    """What is new in every row. Closing it frees them."""
    resolved: Sequence[Sequence[ResolvedEdit]] = ()
    """By row, its edits as they are applied."""
    is_reproducible: bool = False
    """Whether it has the same bytes whatever else there is to do."""
