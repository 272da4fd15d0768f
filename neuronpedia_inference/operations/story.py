"""What a generation has said so far. Every event of a stream shows it again: it is rendered once, and then copied."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from pydantic_core import to_json

from neuronpedia_inference.domain import TokenLogprob, Written
from neuronpedia_inference.operations.rendering import Spelling, json_pieces, plain_pieces
from neuronpedia_inference.schemas.steer import NPLogprob, NPLogprobTop

T = TypeVar("T")
LEAST_LOGPROB = -100.0


class GrowingText:
    """A text that is only added to. A `rendering.Rendered`."""

    def __init__(self, text: str = "") -> None:
        self.text = ""
        self._json = bytearray()
        self.add(text)

    def add(self, text: str) -> None:
        """`text` holds whole characters."""
        self.text += text
        self._json += to_json(text)[1:-1]

    def parts(self, spelling: Spelling) -> Iterator[bytes]:
        yield b'"%b"' % self._json

    def plain(self, spelling: Spelling) -> Generator[None, None, str]:
        yield from ()
        return self.text


class GrowingList(Generic[T]):
    """A list that is only added to; an item is made and rendered when it is first shown. A `rendering.Rendered`."""

    def __init__(self, make: Callable[[T], BaseModel]) -> None:
        self._make = make
        self._items: list[T] = []
        self._json: dict[Spelling, bytearray] = {}
        self._n_json: dict[Spelling, int] = {}
        self._plain: dict[Spelling, list[Any]] = {}

    def add(self, items: Iterable[T]) -> None:
        self._items.extend(items)

    def parts(self, spelling: Spelling) -> Iterator[bytes]:
        kept = self._json.setdefault(spelling, bytearray())
        for item in self._items[self._n_json.get(spelling, 0) :]:
            kept += b"," if kept else b""
            kept += b"".join(json_pieces(self._make(item), spelling, omit_null=False))
            self._n_json[spelling] = self._n_json.get(spelling, 0) + 1
            yield b""
        yield b"[%b]" % kept

    def plain(self, spelling: Spelling) -> Generator[None, None, list[Any]]:
        kept = self._plain.setdefault(spelling, [])
        for item in self._items[len(kept) :]:
            kept.append((yield from plain_pieces(self._make(item), spelling, omit_null=False)))
        return list(kept)


class Transcript:
    """One row: its text, and what else is told of it."""

    def __init__(self, prompt: str, *, has_logprobs: bool, keeps_ending: bool = True) -> None:
        """keeps_ending: whether the text ends in the token that stopped it."""
        self.text = GrowingText()
        self.raw = GrowingText(prompt)
        """Prompt and text."""
        self.logprobs = GrowingList(logprob_reply) if has_logprobs else None
        self.finish_reason: str | None = None
        self._keeps_ending = keeps_ending

    def add(self, written: Written) -> None:
        text = written.text + written.ending if self._keeps_ending else written.text
        self.text.add(text)
        self.raw.add(text)
        if self.logprobs is not None:
            self.logprobs.add(written.logprobs)
        self.finish_reason = written.finish_reason or self.finish_reason


class Story(AsyncIterator[tuple[Written, ...]]):
    """The rows of one generation; every item is what has just been added to them."""

    def __init__(self, source: AsyncIterator[tuple[Written, ...]], rows: Sequence[Transcript]) -> None:
        self.rows = rows
        self._source = source

    @property
    def has_ended(self) -> bool:
        return all(row.finish_reason is not None for row in self.rows)

    async def __anext__(self) -> tuple[Written, ...]:
        news = await anext(self._source)
        for row, written in zip(self.rows, news, strict=True):
            row.add(written)
        return news

    async def rest(self, seconds: float) -> None:
        await getattr(self._source, "rest", asyncio.sleep)(seconds)

    async def aclose(self) -> None:
        close: Any = getattr(self._source, "aclose", None)
        if close is not None:
            await close()


def logprob_reply(one: TokenLogprob) -> NPLogprob:
    """JSON has no infinity: a token without probability gets a number that is as good as none (contract 3.8)."""
    return NPLogprob(
        token=one.token,
        logprob=max(one.logprob, LEAST_LOGPROB),
        top_logprobs=[NPLogprobTop(token=token, logprob=max(value, LEAST_LOGPROB)) for token, value in one.top],
    )
