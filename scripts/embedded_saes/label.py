"""A short readable name for every feature, from the words and contexts on which it fires most strongly."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .scan import Scan, load_scan
from .text import CONTEXT, load
from .words import STOPWORDS, Corpus, readable, stem

MAX_CHARS = 40
WORDS_BEFORE, WORDS_AFTER = 14, 5
SAME_WORD, SAME_NEIGHBOUR, SAME_PIECE, AT_START = 0.5, 0.6, 0.6, 0.6
MIN_CONTEXTS = 3
RARE = 0.06


@dataclass(frozen=True, slots=True)
class Firing:
    """One strong activation: the word it falls on, its piece of that word, and the words around."""

    weight: float
    context: int
    position: int
    piece: str
    starts_word: bool
    word: str
    before: list[str]
    after: list[str]


def label_all(work: Path, layer: int, tokenizer: Any) -> list[str]:
    """One label of at most 40 characters per feature; empty for features that never fire on training text."""
    corpus = Corpus(np.concatenate([part.tokens for part in load(work).values()]).astype(np.int64), tokenizer)
    scan = load_scan(work, layer)
    return [label(firings(corpus, scan, feature), corpus) for feature in range(len(scan.rate))]


def write_labels(target: Path, labels: Sequence[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(labels, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def firings(corpus: Corpus, scan: Scan, feature: int) -> list[Firing]:
    """The strongest activations of a feature, at most one per word, down to a third of the strongest."""
    found: dict[tuple[int, int], Firing] = {}
    strongest = float(scan.value[feature, 0])
    for row, value in zip(scan.row[feature].tolist(), scan.value[feature].tolist(), strict=True):
        if row < 0 or value < strongest / 3:
            break
        number, position = divmod(row, CONTEXT)
        context = corpus.context(number)
        at = context.word_at[position]
        found.setdefault((number, at), _firing(corpus, number, position, at, value))
    return list(found.values())


def _firing(corpus: Corpus, number: int, position: int, at: int, value: float) -> Firing:
    context = corpus.context(number)
    return Firing(
        weight=value,
        context=number,
        position=position,
        piece=readable(corpus.pieces[corpus.tokens[number, position]]),
        starts_word=context.word_at[position - 1] != at,
        word=context.words[at],
        before=context.words[max(0, at - WORDS_BEFORE) : at][::-1],
        after=context.words[at + 1 : at + 1 + WORDS_AFTER],
    )


def label(found: list[Firing], corpus: Corpus) -> str:
    """What is common to the firings: a place, a word, a piece of words, a neighbouring word, else a topic."""
    if not found:
        return ""
    topic = [word for word, _ in topic_words(found, corpus)]
    head = _place(found) or _common_word(found) or _common_piece(found) or _neighbour(found)
    if head is None:
        return _fit(topic[0], topic[1:]) if topic else _fit(_most(f.word for f in found)[0], [])
    word = head.strip("-“”").removeprefix("after “").removeprefix("before “")
    return _fit(head, [other for other in topic if stem(other) != stem(word)])


def topic_words(found: list[Firing], corpus: Corpus) -> list[tuple[str, float]]:
    """Telling words of the firings, best first: weighted by activation, nearness and rarity, one per stem."""
    scores: Counter[str] = Counter()
    contexts: dict[str, set[int]] = {}
    for firing in found:
        for word, nearness in _nearby(firing).items():
            scores[word] += firing.weight * nearness
            contexts.setdefault(word, set()).add(firing.context)
    total = len(corpus.tokens)
    at_least = min(MIN_CONTEXTS, len({firing.context for firing in found}))
    ranked: dict[str, tuple[str, float]] = {}
    for word, score in scores.items():
        frequency = corpus.document_frequency[word] / total
        if not _telling(word) or frequency > RARE or len(contexts[word]) < at_least:
            continue
        value = score * math.log(1 / frequency) * min(1.0, corpus.document_frequency[word] / 4)
        best = ranked.get(stem(word))
        together = value + (best[1] if best else 0.0)
        ranked[stem(word)] = (word if best is None or value > best[1] else best[0], together)
    return sorted(ranked.values(), key=lambda entry: (-entry[1], entry[0]))


def _nearby(firing: Firing) -> dict[str, float]:
    """Word -> nearness: 1 for the word itself, falling with the distance before and, faster, after it."""
    nearness = {firing.word: 1.0}
    for distance, word in enumerate(firing.before, start=1):
        nearness.setdefault(word, 0.6 / (1 + distance / 4))
    for distance, word in enumerate(firing.after, start=1):
        nearness.setdefault(word, 0.4 / (1 + distance / 2))
    return nearness


def _telling(word: str) -> bool:
    return len(word) >= 3 and word.isalpha() and word not in STOPWORDS


def _place(found: list[Firing]) -> str | None:
    share = sum(firing.position <= 3 for firing in found) / len(found)
    return "start of text" if share >= AT_START else None


def _common_word(found: list[Firing]) -> str | None:
    word, share = _most(stem(firing.word) for firing in found)
    if share < SAME_WORD:
        return None
    return _most(firing.word for firing in found if stem(firing.word) == word)[0] or None


def _common_piece(found: list[Firing]) -> str | None:
    """A prefix `un-` or an ending `-ing` shared by different words."""
    piece, share = _most((firing.piece, firing.starts_word) for firing in found)
    text, starts_word = piece
    if share < SAME_PIECE or not text.isalpha():
        return None
    return f"{text}-" if starts_word else f"-{text}"


def _neighbour(found: list[Firing]) -> str | None:
    for name, words in (
        ("after", [firing.before[0] if firing.before else "" for firing in found]),
        ("before", [firing.after[0] if firing.after else "" for firing in found]),
    ):
        word, share = _most(words)
        if word and share >= SAME_NEIGHBOUR:
            return f"{name} “{word}”"
    return None


def _most(values: Iterable[Any]) -> tuple[Any, float]:
    counts = Counter(values)
    value, count = max(counts.items(), key=lambda entry: (entry[1], str(entry[0])))
    return value, count / counts.total()


def _fit(head: str, others: Sequence[str]) -> str:
    """`head · other, other, other` within the length limit."""
    text = head[:MAX_CHARS]
    for number, other in enumerate(others[:3]):
        longer = text + (" · " if number == 0 else ", ") + other
        if len(longer) > MAX_CHARS:
            break
        text = longer
    return text
