"""Tokens that are parts of a character; which tokens are words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from neuronpedia_inference.engine.vocabulary import is_word_like
from neuronpedia_inference.operations.characters import LONGEST, Characters, Shown


def characters(pieces: Sequence[bytes]) -> Characters:
    """Whose token n is the bytes `pieces[n]`."""

    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces[one] for one in ids).decode("utf-8", errors="replace")

    return Characters(lambda one: decode([one]), decode)


def told(pieces: Sequence[bytes]) -> tuple[list[list[Shown]], list[Shown]]:
    """What each push gives, and what is left at the end."""
    one = characters(pieces)
    return [one.push(token) for token in range(len(pieces))], one.rest()


LLAMA = "🦙".encode()


def test_a_token_is_told_at_once_and_a_character_once_it_is_whole() -> None:
    pushed, rest = told([b"a", LLAMA[:1], LLAMA[1:3], LLAMA[3:] + b"b", b"c"])
    whole = [Shown("🦙b"), Shown("🦙b", True), Shown("🦙b", True)]
    assert pushed == [[Shown("a")], [], [], whole, [Shown("c")]]
    assert rest == []


def test_two_characters_after_each_other_are_two() -> None:
    pieces = [LLAMA[n : n + 1] for n in range(4)] * 2
    pushed, rest = told(pieces)
    run = [Shown("🦙"), *[Shown("🦙", True)] * 3]
    assert [one for push in pushed for one in push] == run * 2
    assert rest == []


def test_bytes_that_become_no_character_are_told_alone() -> None:
    pushed, rest = told([b"\xff", *[b"x"] * LONGEST])
    assert pushed[: LONGEST - 1] == [[]] * (LONGEST - 1)
    assert pushed[LONGEST - 1] == [Shown("\ufffd"), *[Shown("x")] * (LONGEST - 1)]
    assert told([b"a", LLAMA[:2]]) == ([[Shown("a")], []], [Shown("\ufffd")])
    assert rest == []


@pytest.mark.parametrize(
    ("text", "is_word"),
    [
        (" word", True),
        ("don't", True),
        ("don’t", True),
        ("well-known\n", True),
        ("42", True),
        ("Ⅻ", True),
        ("слово", True),
        ("猫", True),
        ("", False),
        ("  ", False),
        ("'s", False),
        ("a-", False),
        ("a--b", False),
        ("snake_case", False),
        ("a b", False),
        ("<s>", False),
        ("<|im_end|>", False),
        (".", False),
        ("\ufffd", False),
        ("🦙", False),
    ],
)
def test_words_are_letters_and_numbers_with_joints_inside(text: str, is_word: bool) -> None:
    assert is_word_like(text) is is_word
