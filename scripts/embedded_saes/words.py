"""Tokens -> words that a person can read, with their positions in a context."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

MARKS = {
    ",": "comma", ".": "full stop", ";": "semicolon", ":": "colon", "?": "question mark",
    "!": "exclamation mark", "(": "opening bracket", ")": "closing bracket", "[": "square bracket",
    "]": "square bracket", "{": "curly brace", "}": "curly brace", "-": "hyphen", "--": "dash",
    "–": "dash", "—": "dash", "/": "slash", "'": "apostrophe", '"': "quotation mark", "=": "equals sign",
    "_": "underscore", "*": "asterisk", "%": "percent", "$": "dollar sign", "<": "angle bracket",
    ">": "angle bracket", "<|im_start|>": "turn start", "<|im_end|>": "turn end",
}  # fmt: skip
_STOPWORDS = """
the a an and or but nor so if then than as at by for from in into of off on onto out over to under up
upon with without within about after again against all also am any are aren be because been before being
below between both can cannot could did do does doing don down during each few had has have having he her
here hers him his how i is it its itself just me more most my no not now only other our ours own same she
should some such that their theirs them there these they this those through too until very was we were
what when where which while who whom why will would you your yours may might must shall one two many much
every ever never even still yet however often self none true false def return
"""
STOPWORDS = frozenset(_STOPWORDS.split())
ENDINGS = (("'s", ""), ("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("ly", ""), ("s", ""))
_YEAR = re.compile(r"^(1\d|20)\d\d$")


def readable(word: str) -> str:
    """A word, or the name of a mark, number or break."""
    bare = word.strip(" \t")
    if not bare:
        return "spaces" if word else ""
    if not bare.strip():
        return "blank line" if bare.count("\n") > 1 else "line break"
    bare = bare.strip()
    if any(unicodedata.category(letter) == "Cc" for letter in bare):
        return "control character"
    if any(letter == "\ufffd" or (letter.isalpha() and not _latin(letter)) for letter in bare):
        return "foreign letters"
    if bare in MARKS:
        return MARKS[bare]
    if bare.isdigit():
        return "year" if _YEAR.match(bare) else "number"
    if not any(letter.isalnum() for letter in bare):
        return MARKS.get(bare[0], bare)
    return bare.lower().removesuffix("'s") or bare


def _latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


def stem(word: str) -> str:
    """Enough to see that `armies`, `army's` and `army` are one word."""
    for ending, replacement in (
        ("'s", ""),
        ("ies", "y"),
        ("sses", "ss"),
        ("ing", ""),
        ("ed", ""),
        ("ly", ""),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return (word[: -len(ending)] + replacement).rstrip("e")
    return word.rstrip("e")


@dataclass(frozen=True, slots=True)
class Context:
    """`words` in order; `word_at` [pos] index of the word that a token belongs to."""

    words: list[str]
    word_at: list[int]


class Corpus:
    """Training contexts as words. `tokens` is [context, pos]."""

    def __init__(self, tokens: np.ndarray, tokenizer: Any) -> None:
        self.tokens = tokens
        pieces: list[str] = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.pieces = pieces
        empty_chat = tokenizer.apply_chat_template([{"role": "user", "content": ""}], return_dict=True)
        self.boilerplate = frozenset(self._split([pieces[token] for token in empty_chat["input_ids"]]).words)
        self._contexts: dict[int, Context] = {}

    def context(self, number: int) -> Context:
        if number not in self._contexts:
            self._contexts[number] = self._split([self.pieces[token] for token in self.tokens[number]])
        return self._contexts[number]

    def share(self, word: str) -> float:
        """Share of the contexts that hold `word`."""
        return self.document_frequency[word] / len(self.tokens)

    def _split(self, pieces: list[str]) -> Context:
        words: list[str] = []
        word_at: list[int] = []
        previous = ""
        for piece in pieces:
            if words and _continues(previous, piece):
                words[-1] += piece
            else:
                words.append(piece)
            word_at.append(len(words) - 1)
            previous = piece
        return Context([readable(word) for word in words], word_at)

    @cached_property
    def document_frequency(self) -> Counter[str]:
        """Word -> number of contexts that hold it."""
        counts: Counter[str] = Counter()
        for number in range(len(self.tokens)):
            counts.update(set(self.context(number).words))
        return counts


def _continues(previous: str, piece: str) -> bool:
    if not previous or not piece:
        return False
    left, right = previous[-1], piece[0]
    if right == "'" and piece[1:].isalpha():
        return left.isalpha()
    return (left.isalpha() and right.isalpha()) or (left.isdigit() and right.isdigit())
