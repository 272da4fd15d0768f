"""The frames of a lens answer, as they become known."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from neuronpedia_inference.domain import Lens, Numbers, Section, Tokens, Written
from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.operations.characters import Characters, Shown
from neuronpedia_inference.schemas.lens import (
    LensDone,
    LensFrame,
    LensMeta,
    LensPrompt,
    LensPromptRequest,
    LensResult,
    LensToken,
)
from neuronpedia_inference.watches.plan import WatchPlan

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

Frame = LensMeta | LensPrompt | LensFrame | LensDone
DECIMALS = 4


class LensFailed(EngineFailed):
    """A lens answer that cannot be given: where frames are not streamed, the frame that says so."""

    @property
    def beside(self) -> dict[str, Any]:
        return {"kind": "error"}


class Span(NamedTuple):
    """What a token of a chat belongs to."""

    message_index: int | None = None
    role: str | None = None
    channel: str | None = None
    section: Section | None = None


@dataclass(frozen=True)
class Prompt:
    """What is read."""

    tokens: Tokens
    shown: Sequence[Shown]
    """How each token is told."""
    spans: Sequence[Span] = ()
    """One per token; none for texts."""
    answer: Span = Span()
    """Of what is generated."""

    def span(self, position: int) -> Span:
        if position >= len(self.tokens):
            return self.answer
        return self.spans[position] if self.spans else Span()


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    request: LensPromptRequest
    prompt: Prompt
    layers: dict[Lens, list[int]]
    """By lens, in the order of the answer."""
    plan: WatchPlan
    """One watch per lens; it reads from the first token on that is told."""
    n_new: int
    """Tokens to generate at most."""


class Told(NamedTuple):
    """A token with what was read there."""

    position: int
    id: int
    shown: Shown
    numbers: Numbers
    """[n] of all lenses"""


class Frames(AsyncIterator[Frame]):
    """meta, prompt, a frame per token, done. Closing it ends the generation."""

    def __init__(self, source: AsyncIterator[tuple[Written, ...]], asked: Asked, rt: Runtime) -> None:
        """source: what one row has gained, time after time."""
        self._source = source
        self._asked = asked
        self._rt = rt
        self._ready: deque[Frame | Told] = deque([self.meta(), self._prompt()])
        """What is to be told. A frame of many blocks is made when it is asked for: others have their turns between."""
        self._has_ended = False
        self._position = asked.plan.read_from
        """Of the next token whose numbers come."""
        self._columns = [list(place.behind) for place in asked.plan.places(())]
        self._generated: list[int] = []
        self._text: list[str] = []
        self._characters = Characters(rt.token_string, rt.decode)
        self._held: deque[tuple[int, int, Numbers]] = deque()
        """Generated tokens whose character is not whole yet."""

    async def __anext__(self) -> Frame:
        while not self._ready:
            if self._has_ended:
                raise StopAsyncIteration
            self._ready.extend(await self.more())
            if self._has_ended:
                self._ready.append(self.done())
        first = self._ready.popleft()
        return self.token(first) if isinstance(first, Told) else first

    async def all_tokens(self) -> list[Told]:
        """Of the whole answer. Raises LensFailed where it cannot be given."""
        told: list[Told] = []
        try:
            while not self._has_ended:
                told += await self.more()
        except EngineFailed as exc:
            raise LensFailed(exc.message) from exc
        finally:
            await self.aclose()
        return told

    async def more(self) -> list[Told]:
        """What has become known since the last time."""
        try:
            [written] = await anext(self._source)
        except StopAsyncIteration:
            self._has_ended = True
            return []
        return self._taken(written)

    async def rest(self, seconds: float) -> None:
        await getattr(self._source, "rest", asyncio.sleep)(seconds)

    async def aclose(self) -> None:
        close: Any = getattr(self._source, "aclose", None)
        if close is not None:
            await close()

    def meta(self) -> LensMeta:
        asked, request = self._asked, self._asked.request
        return LensMeta(
            model=request.model,
            types=[lens.value for lens in asked.layers],
            layers_by_type={lens.value: layers for lens, layers in asked.layers.items()},
            top_n=request.top_n,
            prompt_len=len(asked.prompt.tokens),
            num_completion_tokens=asked.n_new,
            temperature=request.temperature,
            prepend_bos=request.prepend_bos,
            reuse_len=asked.plan.read_from,
        )

    def token(self, told: Told) -> LensFrame:
        """With what each lens reads there."""
        results = [
            self._result(lens, len(layers), told.numbers[columns])
            for (lens, layers), columns in zip(self._asked.layers.items(), self._columns, strict=True)
        ]
        return LensFrame(**self._about(told.position, told.id, told.shown), results=results)

    def done(self) -> LensDone:
        n_prompt = len(self._asked.prompt.tokens)
        return LensDone(
            seq_len=n_prompt + len(self._generated),
            prompt_len=n_prompt,
            vocab_size=self._rt.model.vocab_size,
            completion="".join(self._text),
        )

    def _prompt(self) -> LensPrompt:
        ids, shown = self._asked.prompt.tokens.ids, self._asked.prompt.shown
        return LensPrompt(
            tokens=[LensToken(**self._about(place, ids[place], shown[place])) for place in range(len(ids))]
        )

    def _taken(self, written: Written) -> list[Told]:
        self._generated += written.token_ids
        self._text.append(written.text)
        prompt, told = self._asked.prompt, list[Told]()
        for numbers in () if written.numbers is None else written.numbers:
            position, self._position = self._position, self._position + 1
            if position < len(prompt.tokens):
                told.append(Told(position, prompt.tokens.ids[position], prompt.shown[position], numbers))
                continue
            token_id = self._generated[position - len(prompt.tokens)]
            self._held.append((position, token_id, numbers))
            told += self._let_go(self._characters.push(token_id))
        return told if written.finish_reason is None else [*told, *self._let_go(self._characters.rest())]

    def _let_go(self, shown: Sequence[Shown]) -> list[Told]:
        """The tokens held longest, as they are told."""
        return [Told(position, id_, one, numbers) for one in shown for position, id_, numbers in [self._held.popleft()]]

    def _about(self, position: int, token_id: int, shown: Shown) -> dict[str, Any]:
        return {
            "position": position,
            "token": shown.text,
            "id": token_id,
            "is_generated": position >= len(self._asked.prompt.tokens),
            "is_char_continuation": shown.is_continuation,
            **self._asked.prompt.span(position)._asdict(),
        }

    def _result(self, lens: Lens, n_layers: int, numbers: Numbers) -> LensResult:
        """numbers: of each block n ids and n log-probabilities."""
        by_layer = numbers.reshape(n_layers, 2, -1)
        probabilities = np.round(np.exp(by_layer[:, 1].astype(np.float64)), DECIMALS)
        name = self._rt.token_string
        return LensResult(
            type=lens.value,
            top_tokens=[[name(int(token_id)) for token_id in ids] for ids in by_layer[:, 0]],
            top_probs=probabilities.tolist(),
        )
