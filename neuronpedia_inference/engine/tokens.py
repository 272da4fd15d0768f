"""Text to token ids and back, by the rules of the wire contract, 2.4."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from neuronpedia_inference.domain import ChatMessage, Tokens
from neuronpedia_inference.engine.roles import roles_of
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, unknown_name

BosRule = Literal["once", "natural", "prepend", "never"]
"""once: exactly one BOS, added unless the text begins with it. natural: what the tokenizer does by itself.
prepend: BOS in front without looking. never: none. A tokenizer that has no BOS adds none under any rule."""

_WORD_START = "▁"
_ANCHOR = "a"
MOST_NAME = 80
"""Characters of a name that nobody knows, in a message."""
MOST_HELD = 16
"""Tokens that are held back at the most; a character has up to four bytes."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DEFAULT_TEMPLATE = "default"
"""Of several chat templates the one that is for chats without tools or documents."""
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's own program raises of messages, or of tools and documents that are not there."""


NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class TextCodec:
    """A tokenizer with this service's rules. Safe to share: it keeps no state but a table of token strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chatml_fallback: bool = False) -> None:
        self._tokenizer: Any = tokenizer
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self._bos_text: str = self._tokenizer.bos_token or ""
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self._special = frozenset(self._tokenizer.all_special_ids) | {
            i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        self._strings: dict[int, str] = {}
        self._longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)
        self._anchor = tuple(self._tokenizer.encode(_ANCHOR, add_special_tokens=False))
        self._template, self._no_template_because = _chosen(self._tokenizer.chat_template)
        if self._template is None and chatml_fallback:
            self._template = CHATML

    @property
    def has_bos(self) -> bool:
        return self.bos_id is not None

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Of all tokens that are no text: begins, ends, turns."""
        return tuple(sorted(self._special))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def tokenize(
        self,
        text: str,
        bos: BosRule,
        *,
        limit: int,
        suffix: str = "",
        what: str = "Text",
        refusal: str | None = None,
        cut: int | None = None,
    ) -> Tokens:
        """`limit` counts tokens, BOS included; `what` begins the message about it, `suffix` ends its first half.

        refusal: another message, with places for {n}, how much it is, and {limit}. cut: tokens behind so many are left
        out before they are counted; None leaves out none.

        Raises InvalidRequest for text that no tokenizer should see, LimitExceeded for too much of it.
        """
        check_text(text)
        if len(text) > limit * self._longest_token:
            cannot = f"{what} too long: {{n}} cannot fit, max is {{limit}} tokens{suffix}. Shorten the text."
            raise LimitExceeded((refusal or cannot).format(n=f"{len(text)} characters", limit=limit))
        ids = self._encode(text, bos)[:cut]
        if len(ids) > limit:
            too_many = f"{what} too long: {{n}}, max is {{limit}}{suffix}. Shorten the text or raise TOKEN_LIMIT."
            raise LimitExceeded((refusal or too_many).format(n=f"{len(ids)} tokens", limit=limit))
        return self.describe(ids)

    def describe(self, ids: Sequence[int]) -> Tokens:
        """Strings and flags for ids."""
        return Tokens(
            ids=tuple(ids),
            strings=tuple(self.token_string(i) for i in ids),
            is_special=tuple(i in self._special for i in ids),
            has_bos=bool(ids) and self.has_bos and ids[0] == self.bos_id,
        )

    def token_string(self, token_id: int) -> str:
        """One id decoded on its own, its leading space kept; U+FFFD for a piece of a character."""
        if token_id not in self._strings:
            self._strings[token_id] = self._decode_one(token_id)
        return self._strings[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens kept; leading spaces are kept too, whatever the tokenizer's habit."""
        # Some tokenizers strip the first token's space: an anchor before it takes that loss.
        return self._raw_decode([*self._anchor, *ids]).removeprefix(self._raw_decode(self._anchor))

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        limit: int,
        continues: bool = False,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> tuple[str, Tokens]:
        """A chat as the model's template writes it, as text and tokens, with what begins the answer.

        continues: with nothing behind the last message, which the answer goes on with. options: as of `render`.

        Raises InvalidRequest when there is no template, when it does not know a role or refuses the messages, and
        LimitExceeded when they are too long.
        """
        self.check_chat(messages, limit=limit)
        text = self.render(messages, generation_prompt=not continues, continues=continues, options=options)
        return text, self.tokenize(text, "never", limit=limit)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def reads(self, name: str) -> bool:
        """Whether the chat template looks at a name beside the messages."""
        return self._template is not None and re.search(rf"\b{re.escape(name)}\b", self._template) is not None

    def check_chat(self, messages: Sequence[ChatMessage], *, limit: int) -> None:
        """Raises InvalidRequest where there is no template, a role is unknown or a text is none; LimitExceeded."""
        if self._template is None:
            raise InvalidRequest(
                f"{self._no_template_because}, so it cannot accept chat messages. "
                "Use /v1/steer/completion with a raw `prompt` instead."
            )
        for message in messages:
            _check_role(message.role, self._template)
            check_text(message.content)
        if sum(len(m.content) for m in messages) > limit * self._longest_token:
            raise LimitExceeded(f"Text too long: the chat cannot fit, max is {limit} tokens. Shorten the messages.")

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        generation_prompt: bool = True,
        continues: bool = False,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> str:
        """A chat that has passed `check_chat`, as the template writes it. options: what else the template is given.

        Raises InvalidRequest where the template refuses them.
        """
        turns = [
            {"role": m.role, "content": m.content, **m.more} | ({} if m.channel is None else {"channel": m.channel})
            for m in messages
        ]
        try:
            return self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                continue_final_message=continues,
                tokenize=False,
                **options,
            )
        except _TEMPLATE_ERRORS as exc:
            why = " ".join(str(exc).split()) or type(exc).__name__
            raise InvalidRequest(f"The model's chat template refuses these messages: {why}") from exc

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands; no bound."""
        return self._encode(text, "never")

    def _encode(self, text: str, bos: BosRule) -> list[int]:
        if bos == "natural":
            return list(self._tokenizer.encode(text))
        if bos == "prepend" or (bos == "once" and not text.startswith(self._bos_text)):
            text = self._bos_text + text
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _raw_decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False, skip_special_tokens=False)

    def _decode_one(self, token_id: int) -> str:
        text = self._raw_decode([token_id])
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        n_spaces = len(piece) - len(piece.lstrip(_WORD_START)) if isinstance(piece, str) else 0
        return " " * (n_spaces - (len(text) - len(text.lstrip(" ")))) + text


def _chosen(templates: object) -> tuple[str | None, str]:
    """The chat template among those of a tokenizer, one text or texts by name; or None and the reason."""
    if isinstance(templates, Mapping):
        names = ", ".join(map(repr, templates))
        return templates.get(DEFAULT_TEMPLATE), f"This model's chat templates are {names}, none is {DEFAULT_TEMPLATE!r}"
    return (templates if isinstance(templates, str) else None) or None, "This model has no chat template"


def _check_role(role: str, template: str) -> None:
    """Raises InvalidRequest: rendered all the same, a word that the model has not learnt would look like an answer."""
    known = roles_of(template)
    if role not in known:
        raise InvalidRequest(
            f"{unknown_name('role', role[:MOST_NAME], known)} A chat with other roles can be sent as a text, the way "
            "the model is to read it."
        )


class TextStream:
    """Text of a growing sequence of ids. What has been said is never taken back, and costs nothing again.

    A character of several tokens is held back until its last one is there. Bytes that never become a character are
    said as U+FFFD, those of a run that began with whole characters apart from these.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._said: list[int] = []
        """The ids that were said last: some tokenizers read a token by the one before it."""
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """What this id adds, which later ones cannot change."""
        self._held.append(token_id)
        return self._say(can_hold=len(self._held) < MOST_HELD)

    def rest(self) -> str:
        """What is still held back, incomplete characters as U+FFFD."""
        return self._say(can_hold=False) if self._held else ""

    def _say(self, *, can_hold: bool) -> str:
        before = self._codec.decode(self._said)
        text = self._codec.decode([*self._said, *self._held])
        if can_hold and text.endswith("\ufffd"):
            return ""
        if not text.startswith(before):
            before, text = "", self._codec.decode(self._held)
        self._said, self._held = self._held, []
        return text[len(before) :]


def check_text(text: str) -> None:
    """Raises InvalidRequest for NUL characters and lone surrogates."""
    if "\x00" in text:
        raise InvalidRequest(f"The text holds a NUL character at position {text.index(chr(0))}. Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequest(
            f"The text is not valid Unicode: lone surrogate at position {exc.start}. Send whole characters."
        ) from None
