"""A short readable name for every feature, from the words and contexts on which it fires most strongly."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
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
MIN_CONTEXTS, MIN_LIFT, COMMON, SMOOTHING, MIXED = 2, 3.0, 0.1, 6, 0.35
ALIKE = 4


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
    topic = topic_words(found, corpus)
    words = [word.text for word in topic]
    head = _place(found) or _common_word(found) or _common_piece(found) or _neighbour(found)
    if head is not None:
        return _fit(head, _unlike(re.split(r"[^\w]+", head), words))
    if not topic:
        return _fit("mixed", _unlike([], [firing.word for firing in found]))
    if len(set().union(*(word.firings for word in topic[:3]))) < MIXED * len(found):
        return _fit("mixed", _unlike([], words))
    return _fit(words[0], _unlike(words[:1], words[1:]))


@dataclass(frozen=True, slots=True)
class TopicWord:
    """A telling word and the (context, position) of the firings that have a form of it nearby."""

    text: str
    score: float
    firings: set[tuple[int, int]]


def topic_words(found: list[Firing], corpus: Corpus) -> list[TopicWord]:
    """Telling words of the firings, best first, one per stem.

    A word counts by activation and nearness, times the logarithm of how much commoner it is there.
    """
    scores: defaultdict[str, float] = defaultdict(float)
    seen: dict[str, set[tuple[int, int]]] = defaultdict(set)
    forms: dict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for firing in found:
        for word, nearness in _nearby(firing).items():
            if _telling(word) and word not in corpus.boilerplate:
                key = stem(word)
                scores[key] += firing.weight * nearness
                seen[key].add((firing.context, firing.position))
                forms[key][word] += firing.weight * nearness
    ranked: list[TopicWord] = []
    for key, score in scores.items():
        known = sum(corpus.document_frequency[word] for word in forms[key])
        frequency = (known + SMOOTHING) / len(corpus.tokens)
        contexts = len({context for context, _ in seen[key]})
        lift = contexts / len({firing.context for firing in found}) / frequency
        if contexts >= min(MIN_CONTEXTS, len(found)) and frequency <= COMMON and lift >= MIN_LIFT:
            text = max(forms[key], key=lambda word: (forms[key][word], word))
            ranked.append(TopicWord(text, score * math.log(lift), seen[key]))
    return sorted(ranked, key=lambda word: (-word.score, word.text))


def _unlike(shown: Sequence[str], words: Iterable[str]) -> list[str]:
    """Words that add something: none begins like one before it."""
    starts = [word[:ALIKE] for word in shown]
    chosen: list[str] = []
    for word in words:
        if not any(start and (word.startswith(start) or start.startswith(word)) for start in starts):
            chosen.append(word)
            starts.append(word[:ALIKE])
    return chosen


def _nearby(firing: Firing) -> dict[str, float]:
    """Word -> nearness: 2 for the word itself, falling with the distance before and, faster, after it."""
    nearness = {firing.word: 2.0}
    for distance, word in enumerate(firing.before, start=1):
        nearness.setdefault(word, 1 / (1 + distance / 4))
    for distance, word in enumerate(firing.after, start=1):
        nearness.setdefault(word, 0.7 / (1 + distance / 2))
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
    if share < SAME_PIECE or not text.replace("'", "").isalpha():
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
