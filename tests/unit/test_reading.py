"""What chat models write, told apart, however it comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.operations.openai.reading import Harmony, Reader, Tagged, read

MARKER = re.compile(r"<\|\w+\|>")
CASES: list[tuple[Callable[[], Reader], str, str, str]] = [
    (lambda: Tagged("user: hi"), "Hello there.", "", "Hello there."),
    (lambda: Tagged("user: hi"), "<think>So.\n</think>\n\nHello <b>.", "So.\n", "Hello <b>."),
    (lambda: Tagged("user: hi"), "  <thi", "", "  <thi"),
    (lambda: Tagged("user: hi"), "<think>it never ends</thi", "it never ends</thi", ""),
    (lambda: Tagged("assistant: <think>\n"), "So.</think> Hello", "So.", "Hello"),
    (lambda: Tagged("assistant: <think>\n\n</think>\n\n"), "Hello</think>", "", "Hello</think>"),
    (lambda: Tagged("user: hi"), "Hel<|im_start|>lo", "", "Hello"),
    (
        lambda: Harmony("<|start|>user<|message|>hi<|end|><|start|>assistant"),
        "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello",
        "They greet.",
        "Hello",
    ),
    (
        lambda: Harmony("<|start|>assistant"),
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        "",
        '{"a": 1}',
    ),
    (lambda: Harmony("<|start|>assistant<|channel|>final<|message|>Hel"), "lo<|end|>", "", "lo"),
]


@pytest.mark.parametrize(("make", "text", "reasoning", "content"), CASES, ids=range(len(CASES)))
@given(data=st.data())
def test_reasoning_and_content_are_told_apart_however_they_come(
    make: Callable[[], Reader], text: str, reasoning: str, content: str, data: st.DataObject
) -> None:
    """Markers are special tokens, and come whole."""
    units = [unit for part in re.split(r"(<\|\w+\|>)", text) for unit in ([part] if MARKER.match(part) else part)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(units)), max_size=4)))
    reader, said = make(), []
    for first, last in zip([0, *cuts], [*cuts, len(units)], strict=True):
        piece, special = "", []
        for unit in units[first:last]:
            if MARKER.fullmatch(unit):
                special.append((len(piece), len(piece) + len(unit)))
            piece += unit
        read(reader, piece, special)
        said.append(reader.said.taken())
    reader.end()
    said.append(reader.said.taken())
    assert "".join(one.reasoning for one in said) == reasoning
    assert "".join(one.content for one in said) == content
