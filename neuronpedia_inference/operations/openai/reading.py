"""What a chat model writes, told apart: what it thinks, what it says, and the special tokens around them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from neuronpedia_inference.cuts import Cut
from neuronpedia_inference.operations.chat import REASONING_TAGS, open_reasoning

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
MARKERS = (START, CHANNEL, MESSAGE, "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
"""Of harmony, in which gpt-oss speaks: a message is `<|start|>role<|channel|>channel<|message|>text<|end|>`."""
IN_HARMONY = ("start", "channel", "message")
"""Words of a template that writes it."""
ANALYSIS = "analysis"
"""The channel of thoughts."""
_TAGS = frozenset(tag for pair in REASONING_TAGS for tag in pair)
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))


@dataclass
class Said:
    """What has become known since it was last taken."""

    reasoning: str = ""
    content: str = ""

    def taken(self) -> Said:
        news = Said(self.reasoning, self.content)
        self.reasoning = self.content = ""
        return news


class Reader(Protocol):
    """Reads an answer as it is written."""

    said: Said

    def text(self, text: str) -> None:
        """Ordinary text comes next."""
        ...

    def special(self, text: str) -> None:
        """A special token, or a part of one."""
        ...

    def end(self) -> None:
        """Nothing comes any more."""
        ...


def read(reader: Reader, text: str, special: Sequence[tuple[int, int]]) -> None:
    """special: where in the text special tokens lie, as in `Written`."""
    place = 0
    for first, last in special:
        reader.text(text[place:first])
        reader.special(text[first:last])
        place = last
    reader.text(text[place:])


class WithoutSpecial:
    """A text is all content."""

    def __init__(self) -> None:
        self.said = Said()

    def text(self, text: str) -> None:
        self.said.content += text

    def special(self, text: str) -> None:
        """It is no text."""

    def end(self) -> None:
        """There is nothing to wait for."""


class Tagged:
    """Reasoning stands in tags, such as `<think>`, before what is said; perhaps the template has opened them."""

    def __init__(self, rendered: str) -> None:
        self.said = Said()
        self._held = ""
        """What may become a tag."""
        self._reasoning: Cut | None = None
        self._is_content = False
        self._skips_blanks = False
        opened = open_reasoning(rendered).strip()
        if opened:
            self._reasoning = Cut([dict(REASONING_TAGS)[opened]])

    def text(self, text: str) -> None:
        if self._is_content:
            self._say(text)
        elif self._reasoning is not None:
            self._think(self._reasoning, text)
        else:
            self._decide(self._held + text)

    def special(self, text: str) -> None:
        """Some models mark reasoning by special tokens."""
        if text in _TAGS:
            self.text(text)

    def end(self) -> None:
        if self._reasoning is not None and not self._is_content:
            self.said.reasoning += self._reasoning.rest()
        self.said.content += self._held
        self._held = ""

    def _decide(self, text: str) -> None:
        begun = text.lstrip()
        opener = next((one for one, _ in REASONING_TAGS if begun.startswith(one)), None)
        if opener is not None:
            self._held, self._reasoning = "", Cut([dict(REASONING_TAGS)[opener]])
            self._think(self._reasoning, begun[len(opener) :])
        elif any(one.startswith(begun) for one, _ in REASONING_TAGS):
            self._held = text
        else:
            self._held, self._is_content = "", True
            self._say(text)

    def _think(self, reasoning: Cut, text: str) -> None:
        self.said.reasoning += reasoning.push(text)
        if reasoning.has_ended:
            self._is_content = self._skips_blanks = True
            self._say(reasoning.behind)

    def _say(self, text: str) -> None:
        if self._skips_blanks:
            text = text.lstrip()
            self._skips_blanks = not text
        self.said.content += text


class Harmony:
    """Messages on channels: `analysis` is reasoning, the text of all others is content."""

    def __init__(self, rendered: str) -> None:
        """It goes on with the message that the rendered chat has begun."""
        self.said = Said()
        self._begun = ""
        """What may become a marker."""
        self._channel: str | None = None
        self._is_body = False
        for is_marker, piece in _pieces(rendered[max(0, rendered.rfind(START)) :]):
            (self.special if is_marker else self.text)(piece)
        self.said.taken()

    def text(self, text: str) -> None:
        if not self._is_body:
            self._channel = None if self._channel is None else self._channel + text
        elif (self._channel or "").split()[:1] == [ANALYSIS]:
            self.said.reasoning += text
        else:
            self.said.content += text

    def special(self, text: str) -> None:
        self._begun += text
        if self._begun not in MARKERS:
            if not any(marker.startswith(self._begun) for marker in MARKERS):
                self._begun = ""
            return
        marker, self._begun = self._begun, ""
        if marker == CHANNEL:
            self._channel = ""
        elif marker == MESSAGE:
            self._is_body = True
        elif self._is_body or marker == START:
            self._is_body, self._channel = False, None

    def end(self) -> None:
        """There is nothing to wait for."""


def reader_of(rendered: str, *, is_harmony: bool) -> Reader:
    """For the answer to a rendered chat."""
    return Harmony(rendered) if is_harmony else Tagged(rendered)


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Markers (True) and what lies between them."""
    place = 0
    for found in _MARKER.finditer(text):
        yield False, text[place : found.start()]
        yield True, found[0]
        place = found.end()
    yield False, text[place:]
