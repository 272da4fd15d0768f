"""Tokenising by contract 2.4: tokenizers that add BOS by themselves, that do not, and that have none."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from neuronpedia_inference.domain import ChatMessage, Written
from neuronpedia_inference.engine.completions import Completions
from neuronpedia_inference.engine.protocol import RowId, RowStep
from neuronpedia_inference.engine.roles import COMMON
from neuronpedia_inference.engine.tokens import MOST_HELD, TextCodec, TextStream
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from tests import models

Kind = Literal["plain", "auto-bos", "no-bos"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


@cache
def codec(kind: Kind, template: str | None = None) -> TextCodec:
    tokenizer: PreTrainedTokenizerFast = models.tokenizer()
    if kind == "auto-bos":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{models.BOS} $A", special_tokens=[(models.BOS, 0)]
        )
    if kind == "no-bos":
        tokenizer.bos_token = None
    tokenizer.chat_template = template
    return TextCodec(tokenizer)


def ids(kind: Kind, text: str, rule: str) -> list[str]:
    tokens = codec(kind).tokenize(text, rule, limit=50)  # pyright: ignore[reportArgumentType]  (the table's words)
    return ["BOS" if i == 0 else s for i, s in zip(tokens.ids, tokens.strings, strict=True)]


@pytest.mark.parametrize(
    ("kind", "rule", "plain", "with_bos"),
    [
        ("plain", "once", ["BOS", "h", "i"], ["BOS", "h", "i"]),
        ("plain", "natural", ["h", "i"], ["BOS", "h", "i"]),
        ("plain", "prepend", ["BOS", "h", "i"], ["BOS", "BOS", "h", "i"]),
        ("plain", "never", ["h", "i"], ["BOS", "h", "i"]),
        ("auto-bos", "once", ["BOS", "h", "i"], ["BOS", "h", "i"]),
        ("auto-bos", "natural", ["BOS", "h", "i"], ["BOS", "BOS", "h", "i"]),
        ("auto-bos", "prepend", ["BOS", "h", "i"], ["BOS", "BOS", "h", "i"]),
        ("auto-bos", "never", ["h", "i"], ["BOS", "h", "i"]),
        ("no-bos", "once", ["h", "i"], None),
        ("no-bos", "natural", ["h", "i"], None),
        ("no-bos", "prepend", ["h", "i"], None),
    ],
)
def test_bos_rules(kind: Kind, rule: str, plain: list[str], with_bos: list[str] | None) -> None:
    assert ids(kind, "hi", rule) == plain
    if with_bos is not None:
        assert ids(kind, models.BOS + "hi", rule) == with_bos


def test_position_zero_is_bos_only_where_it_is() -> None:
    assert codec("plain").tokenize("hi", "once", limit=9).has_bos
    assert not codec("plain").tokenize("hi", "natural", limit=9).has_bos
    assert not codec("plain").tokenize("h" + models.BOS, "natural", limit=9).has_bos
    assert not codec("no-bos").tokenize("hi", "once", limit=9).has_bos
    tokens = codec("plain").tokenize("h" + models.BOS, "once", limit=9)
    assert tokens.is_special == (True, False, True)


def test_limits_count_bos_and_say_what_to_do() -> None:
    assert len(codec("plain").tokenize("abcd", "once", limit=5)) == 5
    with pytest.raises(LimitExceeded, match=r"Text too long: 6 tokens, max is 5 for batch requests\."):
        codec("plain").tokenize("abcde", "once", limit=5, suffix=" for batch requests")
    with pytest.raises(LimitExceeded, match="1000000 characters"):
        codec("plain").tokenize("a" * 1_000_000, "once", limit=5)


@pytest.mark.parametrize(("text", "says"), [("a\x00b", "NUL .* position 1"), ("ab\ud800", "surrogate at position 2")])
def test_text_that_no_tokenizer_should_see(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        codec("plain").tokenize(text, "once", limit=50)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30))
def test_a_stream_gives_the_whole_text_and_never_takes_a_character_back(text: str) -> None:
    """Byte tokens split every other character; whatever is said is there at once, whole, and stays."""
    source = codec("plain")
    tokens = source.tokenize(text, "never", limit=200)
    stream = TextStream(source)
    said = ""
    for place, token in enumerate(tokens.ids):
        said += stream.push(token)
        assert said == source.decode(tokens.ids[: place + 1]).rstrip("\ufffd") or "\ufffd" in text
    assert said + stream.rest() == text == source.decode(tokens.ids)


def fallback() -> TextCodec:
    """As Llama 2's tokenizer: words with their space in front, bytes for what is in no word."""
    pieces = {"<s>": 0, "▁a": 1, "b": 2, "▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    pieces |= {"a": 260, "▁▁": 261, "▁▁▁a": 262}
    tokenizer = Tokenizer(BPE(pieces, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    return TextCodec(wrapped)


WORDS = st.sampled_from(["▁a", "b", "▁", "é", "€", "🙂"])


@given(st.lists(WORDS, max_size=20))
def test_characters_of_several_byte_tokens_never_shrink(words: list[str]) -> None:
    """Such a decoder reads a run of bytes as a whole: an incomplete one turns all of its characters into U+FFFD."""
    source = FALLBACK
    ids = [i for word in words for i in _ids_of(source, word)]
    stream = TextStream(source)
    said = "".join([stream.push(i) for i in ids])
    assert said + stream.rest() == "".join(words).replace("▁", " ") == source.decode(ids)
    assert "\ufffd" not in said


def test_bytes_that_never_become_a_character_are_said_apart_from_those_that_did() -> None:
    stream = TextStream(FALLBACK)
    ids = [*_ids_of(FALLBACK, "€"), 4 + 0xFF, *_ids_of(FALLBACK, "▁a"), 4 + 0xE2]
    assert [stream.push(i) for i in ids] == ["", "", "€", "", "\ufffd a", ""]
    assert stream.rest() == "\ufffd"


def test_a_run_of_broken_bytes_is_not_held_back_for_ever() -> None:
    stream = TextStream(FALLBACK)
    said = [stream.push(4 + 0xFF) for _ in range(3 * MOST_HELD)]
    assert "".join(said) == "\ufffd" * 3 * MOST_HELD
    assert max(map(len, said)) == MOST_HELD


@pytest.mark.parametrize("cut", [b"", "€".encode()[:2]])
def test_the_token_that_stops_a_row_is_told_apart_from_its_text(cut: bytes) -> None:
    """Also where a character was left half written before it; a row cut off by its length has no such token."""
    ids = [260, *(4 + byte for byte in "é".encode() + cut), 0]
    said = "aé" + "\ufffd" * len(cut)

    def written(reason: str) -> Written:
        completions = Completions(FALLBACK, 1)
        steps = [RowStep(RowId(1, 0), i) for i in ids]
        steps[-1] = replace(steps[-1], finish_reason=reason)
        (row,) = asyncio.run(completions.written(steps))
        assert row.token_ids == tuple(ids)
        return row

    assert (written("stop").text, written("stop").ending) == (said, "<s>")
    assert (written("length").text, written("length").ending) == (said + "<s>", "")


def _ids_of(source: TextCodec, word: str) -> list[int]:
    known = source._tokenizer.get_vocab()
    return [known[word]] if word in known else [4 + byte for byte in word.encode()]


FALLBACK = fallback()


@pytest.mark.parametrize(("piece", "said"), [("▁", " "), ("▁▁", "  "), ("▁▁▁a", "   a"), ("▁a", " a"), ("b", "b")])
def test_a_token_keeps_all_of_its_spaces(piece: str, said: str) -> None:
    """The decoder strips one from what a text begins with."""
    assert FALLBACK.token_string(FALLBACK._tokenizer.convert_tokens_to_ids(piece)) == said


def test_fragments_are_replacement_characters_on_their_own() -> None:
    tokens = codec("plain").tokenize("é", "never", limit=9)
    assert tokens.strings == ("\ufffd", "\ufffd")


def test_chat_is_rendered_by_the_template_and_needs_one() -> None:
    messages = [ChatMessage("user", "hi")]
    text, tokens = codec("plain", TEMPLATE).render_chat(messages, limit=50)
    assert text == "[user]hi[bot]" == "".join(tokens.strings)
    with pytest.raises(InvalidRequest, match="no chat template"):
        codec("plain").render_chat(messages, limit=50)
    with pytest.raises(LimitExceeded, match="13 tokens, max is 12"):
        codec("plain", TEMPLATE).render_chat(messages, limit=12)


def test_a_template_that_refuses_is_the_callers_mistake() -> None:
    picky = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        codec("plain", picky).render_chat([ChatMessage("user", "hi")], limit=50)


CHATML_LIKE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
KNOWS_MORE = (
    "{% for m in messages %}{% set role = m.role %}{% if role in ['available_tools', 'tool'] %}T{% endif %}"
    "{% if (m['role'] == 'ipython') != (loop.index0 % 2 == 0) %}I{% endif %}"
    "{% if m.content == 'wizard' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "role", "is_known"),
    [
        *((template, role, True) for template in (CHATML_LIKE, KNOWS_MORE) for role in COMMON),
        *((template, role, False) for template in (CHATML_LIKE, KNOWS_MORE) for role in ("wizard", "", "User", "role")),
        *((KNOWS_MORE, role, True) for role in ("available_tools", "ipython")),
        *((CHATML_LIKE, role, False) for role in ("available_tools", "ipython")),
    ],
)
def test_a_role_that_the_template_does_not_know_is_refused(template: str, role: str, is_known: bool) -> None:
    """A template that renders any word would have the model read one that it knows nothing of."""
    messages = [ChatMessage("user", "hi"), ChatMessage(role, "ho")]
    if is_known:
        assert "ho" in codec("plain", template).render_chat(messages, limit=99)[0]
        return
    with pytest.raises(InvalidRequest, match=f"Unknown role '{role}'.* Available: assistant, .*sent as a text"):
        codec("plain", template).render_chat(messages, limit=99)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for tool in tools %}{{ tool }}{% endfor %}", "not iterable"),
        ("{{ messages[0].content / 2 }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'].index('x') }}", "substring not found"),
        ("{% if %}", "Expected an expression"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for n in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_raises_anything_is_a_400_with_its_reason(template: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=f"chat template refuses these messages: .*{why}") as refused:
        codec("plain", template).render_chat([ChatMessage("user", "hi")], limit=50)
    assert "\n" not in str(refused.value)


def test_templates_by_names() -> None:
    """As a tokenizer with one for chats, one for tools and one for documents has them."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ tools[0] }}", "default": TEMPLATE}  # pyright: ignore[reportAttributeAccessIssue]  (it may be a dictionary)
    named = TextCodec(tokenizer)
    assert named.has_chat_template
    assert named.render_chat([ChatMessage("user", "hi")], limit=50)[0] == "[user]hi[bot]"
    tokenizer.chat_template = {"rag": "{{ documents[0] }}", "tool_use": "{{ tools[0] }}"}  # pyright: ignore[reportAttributeAccessIssue]  (as above)
    unnamed = TextCodec(tokenizer)
    assert not unnamed.has_chat_template
    with pytest.raises(InvalidRequest, match="templates are 'rag', 'tool_use', none is 'default'"):
        unnamed.render_chat([ChatMessage("user", "hi")], limit=50)


def test_chatml_only_behind_the_option() -> None:
    fallback = TextCodec(models.tokenizer(), chatml_fallback=True)
    text, _ = fallback.render_chat([ChatMessage("user", "hi")], limit=99)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InvalidRequest, match="Unknown role 'wizard'"):
        fallback.render_chat([ChatMessage("wizard", "hi")], limit=99)
