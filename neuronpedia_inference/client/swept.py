"""Results of many texts at once: a sweep over strengths, and how likely continuations are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from neuronpedia_inference.client import html
from neuronpedia_inference.client.results import Cells, Result, terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

AS_ANSWERED = ("text", "prompt", "steering", "strength", "seed", "finish_reason")


@dataclass(frozen=True)
class SweepCell:
    """One text; `steering` and `strength` are None where it is the model's own."""

    text: str
    prompt: int = 0
    steering: int | None = None
    strength: float | None = None
    seed: int = 0
    finish_reason: str | None = None
    logprob_per_token: float | None = None
    """To the unsteered model."""
    repetition: float | None = None
    effects: tuple[float, ...] = ()
    """Mean activations in the text of the features that steer it."""

    @classmethod
    def of(cls, body: dict[str, Any]) -> Self:
        """As the service answers it."""
        judge = body["judge"] or {}
        known: dict[str, Any] = {name: body[name] for name in AS_ANSWERED}
        known |= {name: judge.get(name) for name in ("logprob_per_token", "repetition")}
        return cls(**known, effects=tuple(body["effects"] or ()))


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    """The same prompts at many strengths, beside what the model writes by itself."""

    prompts: tuple[str, ...]
    steerings: tuple[str, ...]
    """What steers, in words."""
    texts: tuple[SweepCell, ...]
    default: tuple[SweepCell, ...] = ()
    suggested: tuple[float | None, ...] = ()
    """By steering, the strength with the largest effect whose texts hold; None where there is none."""
    receipt: dict[str, Any] | None = None
    """What the texts depended on, where `receipt=True` asked for it; `replay` runs it again."""

    def __repr__(self) -> str:
        told = ", ".join(
            f"{name}: {'none' if best is None else f'{best:g}'}"
            for name, best in zip(self.steerings, self.suggested, strict=False)
        )
        return f"Sweep({len(self.texts)} texts{f', suggested {told}' if told else ''})"

    def __iter__(self) -> Iterator[SweepCell]:
        return iter(self.texts)

    def cells(self) -> Cells:
        return [self._row(one) for one in (*self.default, *self.texts)]

    def _row(self, one: SweepCell) -> dict[str, Any]:
        return {
            "prompt": self.prompts[one.prompt],
            "steering": "" if one.steering is None else self.steerings[one.steering],
            "strength": 0.0 if one.strength is None else one.strength,
            "seed": one.seed,
            "logprob_per_token": one.logprob_per_token,
            "repetition": one.repetition,
            "text": one.text,
        }

    def __rich__(self) -> RenderableType:
        draw, parts = terminal(), [terminal().heading(repr(self))]
        for name, head, rows in self._grids():
            shown = [[draw.visible(cell, keep_space=True) for cell in row] for row in rows]
            parts += [draw.heading(name), draw.table(head, shown)]
        return draw.group(*parts)

    def _repr_html_(self) -> str:
        parts = [html.heading(repr(self))]
        for name, head, rows in self._grids():
            parts += [html.heading(name), html.table(head, [[html.text(cell) for cell in row] for row in rows])]
        return html.page(*parts)

    def _grids(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """For every steering its name, head and rows: strengths down, prompts and seeds across."""
        for place, name in enumerate(self.steerings):
            own = [one for one in self.texts if one.steering == place]
            columns = list(dict.fromkeys((one.prompt, one.seed) for one in own))
            best = self.suggested[place] if place < len(self.suggested) else None
            rows = [_across("plain", self.default, columns)]
            for strength in dict.fromkeys(one.strength for one in own):
                label = f"{strength:g}" + (" (suggested)" if strength == best else "")
                rows.append(_across(label, [one for one in own if one.strength == strength], columns))
            yield name, ["strength", *(self._column(*column) for column in columns)], rows

    def _column(self, prompt: int, seed: int) -> str:
        has_seeds = len({one.seed for one in self.texts}) > 1
        return self.prompts[prompt] + (f" · seed {seed}" if has_seeds else "")


def _across(label: str, texts: Sequence[SweepCell], columns: Sequence[tuple[int, int]]) -> list[str]:
    by_column = {(one.prompt, one.seed): one.text for one in texts}
    return [label, *(by_column.get(column, "").strip() for column in columns)]


@dataclass(frozen=True)
class Scored:
    """One continuation."""

    continuation: str
    logprob: float
    """Natural logarithm of its probability."""
    logprob_per_token: float
    is_greedy: bool
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    """Of each token, given all before it."""


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """How likely continuations of a prompt are, in the order in which they were asked for."""

    prompt: str
    continuations: tuple[Scored, ...]

    def __repr__(self) -> str:
        best = max(self.continuations, key=lambda one: one.logprob)
        return f"Scores({len(self.continuations)} continuations, likeliest {best.continuation!r})"

    def __iter__(self) -> Iterator[Scored]:
        return iter(self.continuations)

    def cells(self) -> Cells:
        return [
            {
                "continuation": one.continuation,
                "logprob": one.logprob,
                "logprob_per_token": one.logprob_per_token,
                "is_greedy": one.is_greedy,
            }
            for one in self.continuations
        ]
