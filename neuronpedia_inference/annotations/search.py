"""Features by words: BM25 over their labels and contexts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuronpedia_inference.annotations.values import SourceAnnotations
from neuronpedia_inference.errors import InvalidRequest

LABEL_WEIGHT = 3
"""Times that the words of a label count."""


@dataclass(frozen=True, slots=True)
class Found:
    """A feature that has some of the words."""

    source: str
    index: int
    score: float
    """BM25 (Robertson and Zaragoza, 2009): larger is nearer; comparable within one answer."""


class Searcher:
    """Indexes of the sources that have annotations, each made when it is first searched. Safe to share."""

    def __init__(self, annotations: Mapping[str, SourceAnnotations]) -> None:
        self._annotations = annotations
        self._indexes: dict[str, _Index | None] = {}
        self._making = threading.Lock()

    def search(self, text: str, sources: Sequence[str], limit: int) -> list[Found]:
        """At most `limit` features with some word of `text` in a label or a context, nearest first.

        The first search of a source makes its index. Words are compared by their stems; English words that say nothing
        ("the", "of") are left out. Raises InvalidRequest where there are no others.
        """
        [words] = _words([text])
        if not words:
            raise InvalidRequest(f"q: {text[:80]!r} has no words to look for; words such as 'the' are left out.")
        found: list[Found] = []
        for name in sources:
            index = self._index(name)
            if index is not None:
                found += [Found(name, feature, score) for feature, score in index.best(words, limit)]
        return sorted(found, key=lambda one: -one.score)[:limit]

    def _index(self, name: str) -> _Index | None:
        with self._making:
            if name not in self._indexes:
                known = self._annotations.get(name)
                self._indexes[name] = None if known is None else _Index.of(known)
            return self._indexes[name]


@dataclass(frozen=True)
class _Index:
    ranker: Any
    features: Sequence[int]
    """Of each document."""

    @classmethod
    def of(cls, known: SourceAnnotations) -> _Index | None:
        import bm25s

        texts = {feature: _text(known, feature) for feature in range(len(known))}
        told = {feature: text for feature, text in texts.items() if text}
        documents = _words(list(told.values()))
        if not any(documents):
            return None
        ranker = bm25s.BM25()
        ranker.index(documents, show_progress=False)
        return cls(ranker, tuple(told))

    def best(self, words: list[str], limit: int) -> list[tuple[int, float]]:
        scores = self.ranker.get_scores(words)
        order = np.argsort(-scores, kind="stable")[:limit].tolist()
        return [(self.features[place], float(scores[place])) for place in order if scores[place] > 0]


def _text(known: SourceAnnotations, feature: int) -> str:
    labels = " ".join(known.labels_of(feature))
    contexts = " \n".join("".join(context.tokens) for context in known.contexts(feature))
    return f"{(labels + ' ') * LABEL_WEIGHT}{contexts}".strip()


def _words(texts: list[str]) -> list[list[str]]:
    """Stems, in order."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    found: Any = bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
    return found
