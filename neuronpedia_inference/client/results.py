"""What the client answers: frozen values that print in one line, draw themselves, and go to files and back.

In a terminal `rich.print(result)` draws one, in a notebook its last line does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError

from neuronpedia_inference.client import html
from neuronpedia_inference.client.steering import OfFeature

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from rich.console import RenderableType

SHOWN = 10
"""Features drawn of a long list; all of them are in the value."""

Cells = list[dict[str, Any]]


class Result:
    """What all results can do."""

    kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Result.kinds[cls.__name__] = cls

    @classmethod
    def read(cls, body: Any, **known: Any) -> Self:
        """From an answer of the service, or what `to_json` has written; `known` are fields that it does not have.

        Raises ValueError for another shape.
        """
        try:
            return _adapter(cls).validate_python({**body, **known})
        except (ValidationError, TypeError) as exc:
            raise ValueError(f"this is no {cls.__name__}: {exc}") from None

    def to_json(self) -> str:
        """As text, with the name of its kind."""
        value = _adapter(type(self)).dump_python(self, mode="json")
        return json.dumps({"kind": type(self).__name__, "value": value}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` has written. Raises ValueError for another kind."""
        body = json.loads(text)
        kind = Result.kinds.get(str(body.get("kind"))) if isinstance(body, dict) else None
        if kind is None or not issubclass(kind, cls):
            raise ValueError(f"this is no {cls.__name__}")
        return kind.read(body["value"])

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` has written; `Result.load` reads every kind."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def cells(self) -> Cells:
        """Rows of a table, as dictionaries."""
        raise NotImplementedError(type(self).__name__)

    def df(self) -> pd.DataFrame:
        """The rows as a pandas table."""
        import pandas

        return pandas.DataFrame(self.cells())

    def __rich__(self) -> RenderableType:
        rows = self.cells()
        head = list(rows[0]) if rows else []
        draw = terminal()
        return draw.table(head, [[draw.visible(_said(cell), keep_space=True) for cell in row.values()] for row in rows])

    def _repr_html_(self) -> str:
        rows = self.cells()
        head = list(rows[0]) if rows else []
        return html.page(html.table(head, [[html.text(_said(cell)) for cell in row.values()] for row in rows]))


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def terminal() -> Any:
    """How results are drawn in a terminal; rich is imported when one is."""
    from neuronpedia_inference.client import terminal

    return terminal


def _said(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@dataclass(frozen=True)
class Context:
    """A piece of text on which a feature fires."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    origin: str | None = None


@dataclass(frozen=True)
class Neighbour(OfFeature):
    """A feature whose decoder row points a similar way."""

    source: str
    index: int
    cosine_similarity: float
    label: str | None = None


@dataclass(frozen=True)
class TokenEffect:
    """A token that a feature's direction promotes, or suppresses where `logit` is below zero."""

    token: str
    token_id: int
    logit: float


@dataclass(frozen=True, repr=False)
class Feature(Result, OfFeature):
    """Everything known of one feature."""

    source: str
    index: int
    hook: str
    architecture: str
    label: str | None = None
    labels: tuple[str, ...] = ()
    density: float | None = None
    max: float | None = None
    mean: float | None = None
    contexts: tuple[Context, ...] = ()
    decoder: tuple[float, ...] | None = None
    encoder: tuple[float, ...] | None = None
    norm: float | None = None
    bias: float | None = None
    threshold: float | None = None
    neighbours: tuple[Neighbour, ...] = ()
    promoted: tuple[TokenEffect, ...] = ()
    suppressed: tuple[TokenEffect, ...] = ()
    no_tokens_because: str | None = None

    def __repr__(self) -> str:
        return f"Feature({self.name}, {self.label or 'no label'!r})"

    def cells(self) -> Cells:
        """Its contexts."""
        return [
            {"text": "".join(one.tokens), "max": max(one.values, default=0.0), "from": one.origin or ""}
            for one in self.contexts
        ]

    def _facts(self) -> str:
        known = {"density": self.density, "max": self.max, "mean": self.mean, "threshold": self.threshold}
        return " · ".join([self.hook, *(f"{name} {value:.4g}" for name, value in known.items() if value is not None)])

    def _tokens(self, effects: Sequence[TokenEffect]) -> str:
        return ", ".join(f"{one.token.strip() or repr(one.token)} {one.logit:+.2f}" for one in effects)

    def __rich__(self) -> RenderableType:
        draw = terminal()
        strips = [draw.Strip(one.tokens, one.values, self.max) for one in self.contexts]
        near = [[one.name, one.label or "", f"{one.cosine_similarity:.2f}"] for one in self.neighbours]
        return draw.group(
            draw.heading(f"{self.name} {self.label or 'no label'}", self._facts()),
            *strips,
            draw.heading("promotes", self._tokens(self.promoted) or self.no_tokens_because or "nothing"),
            draw.heading("suppresses", self._tokens(self.suppressed) or "nothing"),
            draw.table(("neighbour", "label", "cosine"), near),
        )

    def _repr_html_(self) -> str:
        strips = [[html.strip(one.tokens, one.values, self.max), html.text(one.origin or "")] for one in self.contexts]
        near = [
            [html.name(one.name), html.text(one.label or ""), html.number(one.cosine_similarity)]
            for one in self.neighbours
        ]
        return html.page(
            html.heading(f"{self.name} {self.label or 'no label'}", self._facts()),
            html.table(("context", "from"), strips),
            html.heading("promotes", self._tokens(self.promoted) or self.no_tokens_because or "nothing"),
            html.heading("suppresses", self._tokens(self.suppressed) or "nothing"),
            html.table(("neighbour", "label", "cosine"), near),
        )


@dataclass(frozen=True)
class FoundFeature(OfFeature):
    """A feature that has some of the words."""

    source: str
    index: int
    score: float
    label: str | None = None
    density: float | None = None
    max: float | None = None
    context: Context | None = None


@dataclass(frozen=True, repr=False)
class SearchResults(Result):
    """Features by words, nearest first."""

    q: str
    features: tuple[FoundFeature, ...]

    def __repr__(self) -> str:
        return f"SearchResults({self.q!r}, {len(self.features)} features)"

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[FoundFeature]:
        return iter(self.features)

    def __getitem__(self, place: int) -> FoundFeature:
        return self.features[place]

    def cells(self) -> Cells:
        return [
            {
                "feature": one.name,
                "label": one.label or "",
                "score": one.score,
                "density": one.density,
                "context": "".join(one.context.tokens) if one.context else "",
            }
            for one in self.features
        ]

    def _repr_html_(self) -> str:
        rows = [
            [
                html.name(one.name),
                html.text(one.label or ""),
                html.number(one.score),
                html.number(one.density),
                html.strip(one.context.tokens, one.context.values) if one.context else "",
            ]
            for one in self.features
        ]
        return html.page(
            html.heading(f"“{self.q}”"), html.table(("feature", "label", "score", "density", "where"), rows)
        )


@dataclass(frozen=True)
class ActiveFeature(OfFeature):
    """A feature on a text."""

    source: str
    index: int
    values: tuple[float, ...]
    """Its activation at every token of the text."""
    max_value: float
    max_value_index: int
    label: str | None = None
    relative: float | None = None
    """How peculiar it is to this text; None where it was not ranked by that."""


@dataclass(frozen=True, repr=False)
class Features(Result):
    """The features of one text, strongest first."""

    tokens: tuple[str, ...]
    features: tuple[ActiveFeature, ...]
    has_bos: bool = False
    """Whether the first token is one that nobody wrote; it is not drawn."""

    def __repr__(self) -> str:
        first = f", strongest {self.features[0].name}" if self.features else ""
        return f"Features({len(self.tokens)} tokens, {len(self.features)} features{first})"

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[ActiveFeature]:
        return iter(self.features)

    def __getitem__(self, place: int) -> ActiveFeature:
        return self.features[place]

    def numpy(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[feature, token]"""
        import numpy

        return numpy.array([one.values for one in self.features], float).reshape(len(self.features), len(self.tokens))

    def cells(self) -> Cells:
        return [
            {
                "feature": one.name,
                "label": one.label or "",
                "max": one.max_value,
                "relative": one.relative,
                "on": self.tokens[one.max_value_index].strip(),
            }
            for one in self.features
        ]

    def __rich__(self) -> RenderableType:
        draw = terminal()
        parts: list[Any] = []
        for one in self.features[:SHOWN]:
            note = f"max {one.max_value:.4g} on {self.tokens[one.max_value_index].strip()!r}"
            first = int(self.has_bos)
            strip = draw.Strip(self.tokens[first:], one.values[first:])
            parts += [draw.heading(f"{one.name} {one.label or 'no label'}", note), strip]
        return draw.group(*parts)

    def _repr_html_(self) -> str:
        first = int(self.has_bos)
        rows = [
            [
                html.text(f"{one.name}\n{one.label or 'no label'}"),
                html.strip(self.tokens[first:], one.values[first:]),
                html.number(one.max_value),
            ]
            for one in self.features[:SHOWN]
        ]
        return html.page(html.table(("feature", "where it fires", "max"), rows))


@dataclass(frozen=True)
class TopFeature(OfFeature):
    """A feature at a token."""

    source: str
    index: int
    value: float
    label: str | None = None
    relative: float | None = None
    """What ranks by `relative`; None without it, and where it is unknown."""


@dataclass(frozen=True, repr=False)
class TopFeatures(Result):
    """The strongest features at every token of one text."""

    tokens: tuple[str, ...]
    top: tuple[tuple[TopFeature, ...], ...]
    """Per token; empty where a token is left out, as BOS may be."""

    def __repr__(self) -> str:
        return f"TopFeatures({len(self.tokens)} tokens, {max(map(len, self.top), default=0)} each)"

    def __getitem__(self, place: int) -> tuple[TopFeature, ...]:
        return self.top[place]

    def cells(self) -> Cells:
        return [
            {"token": token, "rank": rank, "feature": one.name, "label": one.label or "", "value": one.value}
            for token, features in zip(self.tokens, self.top, strict=True)
            for rank, one in enumerate(features, start=1)
        ]


@dataclass(frozen=True)
class SeparatingFeature(OfFeature):
    """A feature of which one set of texts has more."""

    source: str
    index: int
    effect_size: float
    mean_a: float
    mean_b: float
    share_a: float
    share_b: float
    label: str | None = None
    density: float | None = None


@dataclass(frozen=True, repr=False)
class Contrast(Result):
    """The features that separate two sets of texts: `a` are those of which the first has more."""

    a: tuple[SeparatingFeature, ...]
    b: tuple[SeparatingFeature, ...]
    n_dense: int

    def __repr__(self) -> str:
        return f"Contrast({len(self.a)} features for a, {len(self.b)} for b)"

    def cells(self) -> Cells:
        return [
            {
                "more in": side,
                "feature": one.name,
                "label": one.label or "",
                "effect size": one.effect_size,
                "share a": one.share_a,
                "share b": one.share_b,
            }
            for side, features in (("a", self.a), ("b", self.b))
            for one in features
        ]
