"""What the lens operations need of a loaded model: prompts and their limit, the words of its vocabulary, directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuronpedia_inference.domain import ChatMessage, Lens, RenderedChat, Tokens
from neuronpedia_inference.engine.chats import rendered_chat
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.tokens import TextCodec
from neuronpedia_inference.engine.vocabulary import Vocabulary
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.lenses.directions import direction_of
from neuronpedia_inference.lenses.jacobians import Jacobians
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.scheduler.jobs import Steps
from neuronpedia_inference.settings import Settings

TOO_LONG = "This conversation is too long ({n}). The maximum is {limit} tokens: shorten it, or raise LENS_TOKEN_LIMIT."

SteerToken = tuple[int, Lens]
"""A token, and by which lens its direction is found."""


class Lenses:
    """Of one model. Prompts are made on an event loop, directions on the worker."""

    def __init__(self, settings: Settings, engine: ModelEngine, codec: TextCodec, jacobians: Jacobians) -> None:
        self._engine = engine
        self._codec = codec
        self.jacobians = jacobians
        self._limit = min(settings.lens_token_limit, engine.context_length)
        self._words: Vocabulary | None = None

    @property
    def words(self) -> Vocabulary:
        """Once `read_words` has been awaited."""
        assert self._words is not None, "nobody has read the vocabulary yet"
        return self._words

    async def read_words(self) -> Vocabulary:
        """The vocabulary as text, read when it is first asked for."""
        if self._words is None:
            self._words = await paced(Vocabulary.read(self._codec, self._engine.vocab_size))
        return self._words

    def of_text(self, text: str, *, prepend_bos: bool, cut: int | None) -> Tokens:
        """Raises InvalidRequest, and LimitExceeded beyond LENS_TOKEN_LIMIT."""
        bos = "once" if prepend_bos else "never"
        return self._codec.tokenize(text, bos, limit=self._limit, refusal=TOO_LONG, cut=cut)

    def of_ids(self, ids: Sequence[int], *, cut: int | None) -> Tokens:
        """Raises InvalidRequest for ids that the model does not have, LimitExceeded beyond LENS_TOKEN_LIMIT."""
        kept = ids[:cut]
        if len(kept) > self._limit:
            raise LimitExceeded(TOO_LONG.format(n=f"{len(kept)} tokens", limit=self._limit))
        n_vocab = self._engine.vocab_size
        for token_id in kept:
            if not 0 <= token_id < n_vocab:
                raise InvalidRequest(
                    f"input_token_ids: {token_id} is no token of this model, which has 0 to {n_vocab - 1}."
                )
        return self._codec.describe(kept)

    async def of_chat(
        self, messages: Sequence[ChatMessage], *, thinks: bool, keeps_thinking: bool, cut: int | None
    ) -> RenderedChat:
        """With the beginning of an answer, or where the last message is one, with that left open.

        Raises InvalidRequest, and LimitExceeded beyond LENS_TOKEN_LIMIT.
        """
        is_open = messages[-1].role == "assistant"
        wanted: Mapping[str, Any] = {
            "enable_thinking": thinks,
            "preserve_thinking": keeps_thinking,
            "reasoning_effort": "high" if thinks else "low",
        }
        rendering = rendered_chat(
            self._codec,
            messages,
            generation_prompt=not is_open,
            options={name: value for name, value in wanted.items() if self._codec.reads(name)},
            limit=self._limit,
            is_open=is_open,
            refusal=TOO_LONG,
            cut=cut,
        )
        return await paced(rendering)

    def check_jacobians(self) -> None:
        """Raises NoJacobianLens where this model has none."""
        self.jacobians.check()

    def directions(self, tokens: Sequence[SteerToken], layers: Sequence[int]) -> Steps:
        """-> dict[int, Numbers]: behind each block the sum of the tokens' unit directions. Runs on the worker."""
        head: Any = self._engine.decoder.model.get_output_embeddings()
        found = {}
        for layer in layers:
            found[layer] = direction_of(head, self.jacobians, tokens, layer).cpu().numpy()
            yield None
        return found
