"""The text of every token, and which of them are words or parts of words."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuronpedia_inference.engine.tokens import TextCodec

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
"""Letters and numbers of any script, with apostrophes and hyphens between them."""
AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Every token of a model, by id."""

    strings: Sequence[str]
    is_word: NDArray[np.bool_]
    """[vocab]"""
    _by_text: dict[str, int]
    _by_trimmed: dict[str, int]

    @classmethod
    def read(cls, codec: TextCodec, size: int) -> Generator[None, None, Vocabulary]:
        """A yield now and then: there are up to hundreds of thousands."""
        strings: list[str] = []
        is_word = np.zeros(size, np.bool_)
        by_text: dict[str, int] = {}
        by_trimmed: dict[str, int] = {}
        for token_id in range(size):
            text = codec.token_string(token_id)
            strings.append(text)
            is_word[token_id] = is_word_like(text)
            by_text.setdefault(text, token_id)
            by_trimmed.setdefault(text.strip(), token_id)
            if token_id % AT_ONCE == 0:
                yield
        return cls(strings, is_word, by_text, by_trimmed)

    def find(self, text: str) -> int | None:
        """The lowest id of a token that is this text, else of one that is it but for white space around; or None."""
        exact = self._by_text.get(text)
        return self._by_trimmed.get(text.strip()) if exact is None else exact


def is_word_like(text: str) -> bool:
    """Whether a token is a word or a part of one, as the lenses of Neuronpedia have it (contract 4.5)."""
    return _WORD.fullmatch(text.strip()) is not None
