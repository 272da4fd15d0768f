"""Which token of a rendered chat belongs to which message, found by rendering parts of the chat (contract 4.1)."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from neuronpedia_inference.domain import ChatMessage, Part, RenderedChat, Section
from neuronpedia_inference.engine.tokens import TextCodec
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded

FOR_TEMPLATES = ("tools", "documents")
"""Arguments of transformers that only reach the template."""
RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {*FOR_TEMPLATES}
"""Names that say how to render, and not what: a template of the caller's own among them."""
FAILED = "Failed to apply chat template"


def check_options(options: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for names that are not the template's."""
    taken = sorted(RESERVED & options.keys())
    if taken:
        raise InvalidRequest(f"chat_template_kwargs: {', '.join(taken)} cannot be chosen here, leave it out")


def rendered_chat(
    codec: TextCodec,
    messages: Sequence[ChatMessage],
    *,
    generation_prompt: bool,
    options: Mapping[str, Any],
    limit: int,
    is_open: bool = False,
    refusal: str | None = None,
    cut: int | None = None,
) -> Generator[None, None, RenderedChat]:
    """A chat as text and tokens, each with what it belongs to; a yield between two renderings.

    options: what the template is given beside the messages. is_open: the last message goes on, its turn is not closed.
    refusal, cut: as `TextCodec.tokenize` takes them. Raises LimitExceeded beyond `limit` tokens, and InvalidRequest for
    names that are not the template's, or whatever the template refuses.
    """
    check_options(options)
    try:
        codec.check_chat(messages, limit=limit)
        text = codec.render(messages, generation_prompt=generation_prompt, continues=is_open, options=options)
        tokens = codec.tokenize(text, "never", limit=limit, what="Rendered chat", refusal=refusal, cut=cut)
    except LimitExceeded:
        raise
    except InvalidRequest as exc:
        raise InvalidRequest(f"{FAILED}: {exc.message}") from exc
    yield
    parts: list[Part] = []
    last = len(messages) - 1
    for place, message in enumerate(messages):
        before, start = messages[:place], len(parts)
        end = max(start, _n_alike(tokens.ids, _ids(codec, [*before, message], options)))
        yield
        empty = _ids(codec, [*before, replace(message, content="")], options)
        yield
        own = tokens.ids[start:end]
        can_compare = bool(empty) and tuple(empty[:start]) == tokens.ids[:start]
        has_end = not (is_open and place == last)
        sections = _sections(own, empty[start:], has_end=has_end) if can_compare else _unknown(len(own))
        parts += [Part(place, section) for section in sections]
    parts += [Part(last, "content") if is_open else Part(None, "header")] * (len(tokens) - len(parts))
    return RenderedChat(text, tokens, tuple(parts))


def _ids(codec: TextCodec, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> list[int]:
    """Of the beginning of a chat, without generation prompt; none where the template refuses it by itself."""
    try:
        return codec.encode(codec.render(messages, generation_prompt=False, options=options))
    except InvalidRequest:
        return []


def _sections(own: Sequence[int], empty: Sequence[int], *, has_end: bool) -> list[Section]:
    """Of a message's tokens, by those of the same message without content."""
    n_header = _n_alike(own, empty)
    n_footer = _n_alike(own[n_header:][::-1], empty[n_header:][::-1]) if has_end else 0
    n_content = len(own) - n_header - n_footer
    names: tuple[tuple[Section, int], ...] = (("header", n_header), ("content", n_content), ("footer", n_footer))
    return [name for name, n_tokens in names for _ in range(n_tokens)]


def _unknown(n_tokens: int) -> list[Section]:
    return ["scaffold" for _ in range(n_tokens)]


def _n_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
