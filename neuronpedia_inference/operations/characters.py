"""Tokens as text, where some are only parts of a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

LONGEST = 8
"""Tokens that one character is looked for in."""
NO_CHARACTER = "\ufffd"


class Shown(NamedTuple):
    """How a token is told."""

    text: str
    is_continuation: bool = False
    """Whether it goes on with the character of the token before it."""


class Characters:
    """Tokens in their order: each is told once its whole character is known."""

    def __init__(self, string_of: Callable[[int], str], decode: Callable[[Sequence[int]], str]) -> None:
        """string_of: one token. decode: several, together."""
        self._string_of = string_of
        self._decode = decode
        self._held: list[int] = []

    def push(self, token_id: int) -> list[Shown]:
        """One token more; those that can be told now."""
        self._held.append(token_id)
        return self._shown(is_end=False)

    def rest(self) -> list[Shown]:
        """There are no more."""
        return self._shown(is_end=True)

    def _shown(self, *, is_end: bool) -> list[Shown]:
        shown: list[Shown] = []
        while self._held:
            n = self._n_whole()
            if n == 0 and not is_end and len(self._held) < LONGEST:
                break
            n = max(n, 1)
            text = self._string_of(self._held[0]) if n == 1 else self._decode(self._held[:n])
            shown += [Shown(text, place > 0) for place in range(n)]
            self._held = self._held[n:]
        return shown

    def _n_whole(self) -> int:
        """Of the tokens that are held, how many from the first on make whole characters; 0 if none do."""
        if NO_CHARACTER not in self._string_of(self._held[0]):
            return 1
        wholes = (
            n for n in range(2, len(self._held[:LONGEST]) + 1) if NO_CHARACTER not in self._decode(self._held[:n])
        )
        return next(wholes, 0)
