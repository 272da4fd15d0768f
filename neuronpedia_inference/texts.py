"""What a runtime does with texts: tokens, chats and back, within its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuronpedia_inference.capabilities import max_tokens, token_limit
from neuronpedia_inference.domain import ChatMessage, RenderedChat, Tokens
from neuronpedia_inference.engine.chats import check_options, rendered_chat
from neuronpedia_inference.engine.protocol import ModelInfo
from neuronpedia_inference.engine.tokens import NO_OPTIONS, BosRule, TextCodec
from neuronpedia_inference.errors import LimitExceeded
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.settings import Settings

BATCH_SHARE = 4
"""Each prompt of a batch may have this fraction of TOKEN_LIMIT."""


class Texts:
    """The part of a runtime that needs no device."""

    settings: Settings
    model: ModelInfo
    _codec: TextCodec

    def tokenize(self, text: str, bos: BosRule, *, limit: int | None = None, batch: bool = False) -> Tokens:
        """`limit` None is TOKEN_LIMIT, a quarter of it with `batch`. Raises InvalidRequest or LimitExceeded."""
        limit = limit or token_limit(self.settings, self.model)
        if batch:
            return self._codec.tokenize(text, bos, limit=max(1, limit // BATCH_SHARE), suffix=" for batch requests")
        return self._codec.tokenize(text, bos, limit=limit)

    def tokens(self, ids: Sequence[int]) -> Tokens:
        """Ids as they are. Raises LimitExceeded for more than TOKEN_LIMIT."""
        limit = token_limit(self.settings, self.model)
        if len(ids) > limit:
            raise LimitExceeded(f"{len(ids)} tokens, max is {limit}. Send fewer or raise TOKEN_LIMIT.")
        return self._codec.describe(ids)

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        continues: bool = False,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> tuple[str, Tokens]:
        """The chat as the model reads it, with what begins the answer, or (`continues`) open at its last message.

        options: what the template is given beside the messages. Raises InvalidRequest or LimitExceeded.
        """
        check_options(options)
        limit = token_limit(self.settings, self.model)
        return self._codec.render_chat(messages, limit=limit, continues=continues, options=options)

    def template_names(self, name: str) -> bool:
        """Whether the chat template reads what is called so."""
        return self._codec.reads(name)

    async def apply_chat_template(
        self, messages: Sequence[ChatMessage], *, generation_prompt: bool, options: Mapping[str, Any], limit: int = 0
    ) -> RenderedChat:
        """The chat with what each token belongs to; `limit` 0 is TOKEN_LIMIT. Raises InvalidRequest, LimitExceeded."""
        limit = limit or token_limit(self.settings, self.model)
        return await paced(
            rendered_chat(self._codec, messages, generation_prompt=generation_prompt, options=options, limit=limit)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens kept."""
        return self._codec.decode(ids)

    def token_string(self, token_id: int) -> str:
        """One id as text, its leading space kept."""
        return self._codec.token_string(token_id)

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its completion together."""
        return max_tokens(self.settings, self.model)
