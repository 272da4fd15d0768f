"""What the lens operations ask of a runtime, without a model: numbers that are zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from neuronpedia_inference.domain import Lens, RenderedChat, Tokens, Written
from neuronpedia_inference.engine.vocabulary import Vocabulary
from neuronpedia_inference.errors import NoJacobianLens
from neuronpedia_inference.watches.plan import LensRead, WatchLens, WatchPlan

N_LAYERS = 3


class FakeLenses:
    """A model of three blocks without Jacobians."""

    def __init__(self, tokenize: Callable[[str], Tokens], chat: Callable[..., Any], strings: Sequence[str]) -> None:
        self._tokenize = tokenize
        self._chat = chat
        self._strings = strings

    async def read_words(self) -> Vocabulary:
        ids = {text: place for place, text in enumerate(self._strings)}
        return Vocabulary(self._strings, np.ones(len(self._strings), np.bool_), ids, ids)

    def of_text(self, text: str, *, prepend_bos: bool, cut: int | None) -> Tokens:
        return self._tokenize(text)

    async def of_chat(self, messages: Sequence[Any], **_: Any) -> RenderedChat:
        return await self._chat(messages, generation_prompt=True, options={})


class FakeWatches:
    """Of the same."""

    def lens_layers(self, lens: Lens, n: int) -> list[int]:
        if lens is Lens.JACOBIAN:
            raise NoJacobianLens("Jacobian lens is not available for this model", "a fake has none")
        return list(range(N_LAYERS))

    def read_by(self, lens: Lens, layers: Sequence[int], n: int, *, words_only: bool = False) -> WatchLens:
        return WatchLens(tuple(LensRead(layer, n, lens, words_only) for layer in layers))


def read(prompt: Tokens, plan: WatchPlan) -> list[tuple[Written, ...]]:
    """Zeros at every position."""
    numbers = np.zeros((len(prompt) - plan.read_from, plan.n_numbers(())))
    return [(Written(finish_reason="length", numbers=numbers),)]
