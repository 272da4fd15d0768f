"""Results about texts that the model wrote: steered and plain, with what was watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.client import html
from neuronpedia_inference.client.results import Cells, Result, terminal
from neuronpedia_inference.client.steering import Steering

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class WatchedEdit:
    """What one edit has found and done, a value for every token; None where it has not acted."""

    edit: str
    """Which of the request, such as "edits.0"."""
    share: tuple[float, ...]
    """How much it has acted, from 0 to 1."""
    dose: tuple[float | None, ...]
    """The norm of what it has written, by that of what was there."""
    before: tuple[float | None, ...] | None = None
    """The number that it has read; None of `add`, which reads none, as are the two that follow."""
    target: tuple[float | None, ...] | None = None
    after: tuple[float | None, ...] | None = None
    """The number read again behind all edits of its place."""
    id: str | None = None


@dataclass(frozen=True)
class WatchValues:
    """What one watch has read, a value for every token."""

    watch: dict[str, Any] | str
    """As it was asked for."""
    after: tuple[Any, ...] | None = None
    """What the rest of the model read: a number for a feature, features for `top_k`, a vector for a hook."""
    before: tuple[Any, ...] | None = None
    """What came to that place, where the text was steered there."""
    edits: tuple[WatchedEdit, ...] | None = None
    """Of "edits": every edit of the text."""

    @property
    def name(self) -> str:
        """`source/index` of a feature, else what was asked for."""
        if isinstance(self.watch, str):
            return self.watch
        if self.watch.get("index") is not None:
            return f"{self.watch.get('source') or ''}/{self.watch['index']}".lstrip("/")
        return ", ".join(f"{key} {value}" for key, value in self.watch.items() if value is not None)

    @property
    def is_strip(self) -> bool:
        """Whether it is one number for each token."""
        return self.after is not None and all(isinstance(value, int | float) for value in self.after)


@dataclass(frozen=True)
class Watched:
    """What was read while a text was written, of prompt and text."""

    tokens: tuple[str, ...]
    values: tuple[WatchValues, ...]


@dataclass(frozen=True)
class Text:
    """A text that the model wrote."""

    text: str
    messages: tuple[dict[str, str], ...] | None = None
    finish_reason: str | None = None
    tokens: tuple[str, ...] = ()
    watch: Watched | None = None
    events: tuple[dict[str, int], ...] | None = None
    """What rules took back, in order."""
    over_dose: tuple[dict[str, Any], ...] | None = None
    """Edits that wrote more than `max_dose`."""


@dataclass(frozen=True)
class _Strip:
    """One watched feature over a text, without a token in front that nobody wrote."""

    name: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Steered(Result):
    """What the model wrote steered, and what it wrote by itself."""

    prompt: str
    steered: Text
    default: Text | None = None
    steering: Steering | None = None
    receipt: dict[str, Any] | None = None
    """What both depended on, with `receipt=True`; `Client.replay` runs it again."""

    def __repr__(self) -> str:
        return f"Steered({self.steered.text[:60]!r})"

    def __str__(self) -> str:
        return self.steered.text

    def cells(self) -> Cells:
        return [{"text": name, "said": f"{self.prompt}{one.text}"} for name, one in self._texts()]

    def _texts(self) -> list[tuple[str, Text]]:
        both = (("plain", self.default), ("steered", self.steered))
        return [(name, one) for name, one in both if one is not None]

    def _strips(self, text: Text) -> list[_Strip]:
        if text.watch is None:
            return []
        tokens = text.watch.tokens
        first = 0 if not tokens or self.prompt.startswith(tokens[0]) else 1
        watched = [one for one in text.watch.values if one.is_strip]
        return [_Strip(one.name, tokens[first:], (one.after or ())[first : len(tokens)]) for one in watched]

    def _most(self) -> dict[str, float]:
        """The largest value of each watched feature in both texts, so that colours compare."""
        most: dict[str, float] = {}
        for _, text in self._texts():
            for strip in self._strips(text):
                most[strip.name] = max(most.get(strip.name, 0.0), *strip.values)
        return most

    def __rich__(self) -> RenderableType:
        draw, most = terminal(), self._most()
        rows = [[row["text"], row["said"]] for row in self.cells()]
        parts = [draw.heading(repr(self.steering or Steering())), draw.table(("", "text"), rows)]
        for name, text in self._texts():
            for strip in self._strips(text):
                parts += [draw.heading(strip.name, name), draw.Strip(strip.tokens, strip.values, most[strip.name])]
        return draw.group(*parts)

    def answer_strips(self) -> RenderableType:
        """What was watched, over the steered text alone, for a terminal."""
        draw, parts = terminal(), []
        for strip in self._strips(self.steered):
            n_prompt = len(strip.tokens) - len(self.steered.tokens)
            values = strip.values[n_prompt:]
            note = f"max {max(values, default=0.0):.4g}"
            parts += [draw.heading(strip.name, note), draw.Strip(strip.tokens[n_prompt:], values)]
        return draw.group(*parts)

    def _repr_html_(self) -> str:
        prompt, most = f'<span style="opacity:0.6">{html.text(self.prompt)}</span>', self._most()
        parts: list[tuple[str, str]] = []
        for name, text in self._texts():
            strips = "".join(
                html.heading(strip.name) + html.strip(strip.tokens, strip.values, most[strip.name])
                for strip in self._strips(text)
            )
            parts.append((name, prompt + html.text(text.text) + strips))
        return html.page(html.heading(repr(self.steering or Steering())), html.columns(parts))
