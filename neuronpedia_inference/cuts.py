"""A growing text up to the first of some strings."""

from __future__ import annotations

from collections.abc import Sequence


class Cut:
    """A growing text up to the first of some strings. What may still become one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.has_ended = False
        """Whether one has been found; nothing is told from there on."""
        self.behind = ""
        """What came with its last piece, and lies behind it."""

    def push(self, text: str) -> str:
        """What this adds to the text, which later pieces cannot change."""
        if self.has_ended:
            return ""
        text = self._held + text
        found = [(place, string) for string in self._strings if (place := text.find(string)) >= 0]
        if found:
            place, string = min(found)
            self.has_ended, self.behind = True, text[place + len(string) :]
            return text[:place]
        end = len(text) - max((_n_begun(text, string) for string in self._strings), default=0)
        self._held = text[end:]
        return text[:end]

    def rest(self) -> str:
        """What is held back, of a text that has ended otherwise; nothing when asked again."""
        held, self._held = self._held, ""
        return "" if self.has_ended else held


def _n_begun(text: str, string: str) -> int:
    """Characters at the end of `text` that `string` begins with; not all of it."""
    start = text.find(string[0], max(0, len(text) - len(string) + 1))
    while start >= 0:
        if string.startswith(text[start:]):
            return len(text) - start
        start = text.find(string[0], start + 1)
    return 0
