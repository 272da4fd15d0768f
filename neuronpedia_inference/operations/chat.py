"""Chats as text: reasoning taken out of earlier answers, and answers read back from what was generated."""

from __future__ import annotations

from collections.abc import Sequence

from neuronpedia_inference.domain import ChatMessage

OPEN, CLOSE = "<think>", "</think>"
REASONING_TAGS = (
    (OPEN, CLOSE),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
)
"""How model families mark reasoning; answers are given with the first pair."""

TURN_ENDS = (
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<｜end▁of▁sentence｜>",
)


def without_reasoning(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Earlier assistant messages lose closed think blocks; one left empty by this is dropped."""
    kept = []
    for message in messages:
        if message.role != "assistant":
            kept.append(message)
            continue
        content = _strip_blocks(message.content)
        if content == message.content or content.strip():
            kept.append(ChatMessage(message.role, content))
    return kept


def _strip_blocks(text: str) -> str:
    """Text without `<think>…</think>` and the white space after it; linear in the length of any text."""
    parts = []
    at = 0
    while (start := text.find(OPEN, at)) >= 0 and (end := text.find(CLOSE, start)) >= 0:
        parts.append(text[at:start])
        at = end + len(CLOSE)
        while text[at : at + 1].isspace():
            at += 1
    return "".join([*parts, text[at:]])


def open_reasoning(rendered: str) -> str:
    """The tail with which a rendered chat leaves reasoning open, such as `<think>\\n`; else nothing."""
    bare = rendered.rstrip()
    for opener, _ in REASONING_TAGS:
        if bare.endswith(opener):
            return rendered[len(bare) - len(opener) :]
    return ""


def read_answer(generated: str, opened: str = "") -> str:
    """The content of the assistant message in a generated text; empty while there is none.

    opened: what `open_reasoning` says of the prompt, because the generation then starts inside the reasoning.
    """
    text = _first_turn(generated).strip()
    if not text:
        return ""
    text = opened + text
    for opener, closer in REASONING_TAGS:
        if text.startswith(opener):
            return OPEN + text[len(opener) :].replace(closer, CLOSE, 1)
    return text


def _first_turn(generated: str) -> str:
    ends = [at for marker in TURN_ENDS if (at := generated.find(marker)) >= 0]
    return generated[: min(ends, default=len(generated))]
