"""Annotations of one source's features, in columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
LAST = 1e-12
"""Peculiarity of features of which too little is known: less than any other, but not nothing."""
Stored = Mapping[int, bytes]
"""Contexts by feature, as the JSON list that `stored_contexts` makes: read only when somebody asks."""


@dataclass(frozen=True, slots=True)
class Context:
    """A piece of text on which a feature fires."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """Its activation at each token."""
    origin: str | None = None
    """Where the text is from."""


def nothing() -> Stored:
    """No contexts at all."""
    return {}


@dataclass(frozen=True)
class SourceAnnotations:
    """What is known of the features of one source: one entry per feature in every column."""

    labels: Sequence[str]
    """Empty where a feature has no label."""
    density: Column
    """Share of the tokens of some text on which the feature fires; NaN where unknown."""
    maximum: Column
    """Its largest activation on that text; NaN where unknown."""
    mean: Column
    """Its mean where it fires; NaN where unknown."""
    other_labels: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """More labels of the features that have several."""
    read_contexts: Callable[[], Stored] = nothing

    @classmethod
    def of_labels(cls, labels: Sequence[str]) -> SourceAnnotations:
        """Labels and nothing else."""
        return cls(labels, unknown(len(labels)), unknown(len(labels)), unknown(len(labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def labels_of(self, index: int) -> tuple[str, ...]:
        """All labels of a feature, the one that is shown first."""
        return (*filter(None, (self.labels[index],)), *self.other_labels.get(index, ()))

    def contexts(self, index: int) -> tuple[Context, ...]:
        """Where a feature fires most, the strongest first."""
        return tuple(
            Context(tuple(one["tokens"]), tuple(one["values"]), one.get("from"))
            for one in json.loads(self._stored.get(index, b"[]"))
        )

    @cached_property
    def peculiarity(self) -> Column:
        """[feature]: −log10(density) / maximum. Times an activation it says how near the feature is to its own maximum,
        weighed by how rare it is: a full activation counts one for every tenfold rarer.

        LAST where density or maximum is unknown or zero: such features come behind all others that fire.
        """
        known = (self.density > 0) & (self.density < 1) & (self.maximum > 0)
        density, maximum = np.where(known, self.density, 0.5), np.where(known, self.maximum, 1)
        return np.where(known, -np.log10(density) / maximum, LAST).astype(np.float64)

    def peculiarity_of(self, index: int) -> float | None:
        """Of one feature; None where too little is known of it."""
        value = float(self.peculiarity[index])
        return value if value > LAST else None

    @cached_property
    def has_contexts(self) -> bool:
        return bool(self._stored)

    @cached_property
    def _stored(self) -> Stored:
        return self.read_contexts()


def unknown(n_features: int) -> Column:
    """A column in which nothing is known."""
    return np.full(n_features, np.nan, np.float64)


def stored_contexts(contexts: Iterable[Context]) -> bytes:
    """Contexts as `SourceAnnotations` keeps them, the strongest first."""
    ranked = sorted(contexts, key=lambda context: -max(context.values, default=0.0))
    body = [{"tokens": one.tokens, "values": one.values, "from": one.origin} for one in ranked]
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
