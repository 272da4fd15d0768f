"""Which token of a rendered chat belongs to which message: contract 4.1, on templates with habits of their own."""

from __future__ import annotations

from typing import Any

import pytest

from neuronpedia_inference.domain import ChatMessage, RenderedChat
from neuronpedia_inference.engine.chats import rendered_chat
from neuronpedia_inference.engine.tokens import TextCodec
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from tests import models

PLAIN = (
    "start{% for m in messages %}[{{ m.role }}{{ '@' + m.channel if m.channel else '' }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)
ONE_TURN = (
    "{% if messages|length < 2 %}{{ raise_exception('a user has to follow') }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ messages[0].content if loop.first }}|{{ m.content }}>{% endfor %}"
)
CHAT = [ChatMessage("user", "hi"), ChatMessage("assistant", "yo ho"), ChatMessage("user", "")]


def rendered(template: str | None, messages: list[ChatMessage], *, limit: int = 200, **how: Any) -> RenderedChat:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template
    how = {"generation_prompt": True, "options": {}, **how}
    steps = rendered_chat(TextCodec(tokenizer), messages, limit=limit, **how)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def runs(chat: RenderedChat) -> list[tuple[int | None, str, str]]:
    """(message, section, text) of neighbours that belong to the same."""
    found: list[tuple[int | None, str, str]] = []
    assert len(chat.parts) == len(chat.tokens)
    for part, text in zip(chat.parts, chat.tokens.strings, strict=True):
        is_same = bool(found) and found[-1][:2] == (part.message, part.section)
        found.append((part.message, part.section, (found.pop()[2] if is_same else "") + text))
    return found


def test_messages_have_header_content_and_footer() -> None:
    chat = rendered(PLAIN, CHAT)
    assert chat.text == "start[user]hi;[assistant]yo ho;[user];[bot]" == "".join(chat.tokens.strings)
    assert runs(chat) == [
        (0, "header", "start[user]"),  # what stands before all messages is the first one's
        (0, "content", "hi"),
        (0, "footer", ";"),
        (1, "header", "[assistant]"),
        (1, "content", "yo ho"),
        (1, "footer", ";"),
        (2, "header", "[user];"),  # nothing tells the footer of an empty message apart
        (None, "header", "[bot]"),
    ]


def test_without_generation_prompt_nothing_follows_the_last_message() -> None:
    assert runs(rendered(PLAIN, CHAT[:1], generation_prompt=False))[-1] == (0, "footer", ";")


def test_the_template_is_given_channels_and_what_the_caller_wants() -> None:
    [header, *_] = runs(rendered(PLAIN, [ChatMessage("assistant", "yo", "final")]))
    assert header == (0, "header", "start[assistant@final]")
    asks = "{{ 'think' if enable_thinking else 'quick' }}:{{ messages[0].content }}{{ tools|length }}"
    options = {"enable_thinking": False, "tools": [{"type": "function"}]}
    assert rendered(asks, CHAT[:1], options=options).text == "quick:hi1"
    assert rendered(asks, CHAT[:1], options={**options, "enable_thinking": True}).text == "think:hi1"


def test_a_message_that_cannot_stand_alone_belongs_to_the_one_it_is_written_with() -> None:
    """The template writes the system's words into the user's turn, and refuses them by themselves."""
    chat = rendered(ONE_TURN, [ChatMessage("system", "be"), ChatMessage("user", "hi")])
    assert chat.text == "<be|hi>"
    assert runs(chat) == [(1, "header", "<be|"), (1, "content", "hi"), (1, "footer", ">")]


def test_a_template_that_wants_content_leaves_scaffold() -> None:
    picky = "{% for m in messages %}{{ m.content if m.content else raise_exception('empty') }}.{% endfor %}"
    assert runs(rendered(picky, CHAT[:2])) == [(0, "scaffold", "hi."), (1, "scaffold", "yo ho.")]


@pytest.mark.parametrize(
    ("template", "messages", "how", "error", "says"),
    [
        (None, CHAT, {}, InvalidRequest, r"^Failed to apply chat template: This model has no chat template"),
        ("{{ raise_exception('no') }}", CHAT, {}, InvalidRequest, r"^Failed to apply chat template: .*no$"),
        (
            PLAIN,
            [ChatMessage("admin", "x")],
            {},
            InvalidRequest,
            "^Failed to apply chat template: Unknown role 'admin'",
        ),
        (PLAIN, [ChatMessage("user", "\x00")], {}, InvalidRequest, "^Failed to apply chat template: .*NUL"),
        ("{{ messages[0].role }}", [], {}, InvalidRequest, "^Failed to apply chat template: "),
        (PLAIN, CHAT, {"limit": 43}, None, ""),
        (PLAIN, CHAT, {"limit": 42}, LimitExceeded, "^Rendered chat too long: 43 tokens, max is 42"),
        (
            PLAIN,
            CHAT,
            {"options": {"chat_template": "x"}},
            InvalidRequest,
            "chat_template_kwargs: chat_template cannot",
        ),
        (PLAIN, CHAT, {"options": {"tokenize": True, "messages": []}}, InvalidRequest, "messages, tokenize cannot"),
    ],
)
def test_what_is_refused(template: str | None, messages: Any, how: dict[str, Any], error: Any, says: str) -> None:
    if error is None:
        assert len(rendered(template, messages, **how).tokens) == 43
        return
    with pytest.raises(error, match=says) as refused:
        rendered(template, messages, **how)
    assert type(refused.value) is error
