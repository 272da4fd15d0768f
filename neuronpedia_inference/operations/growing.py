"""Parts of an answer that are only added to. Every event of a stream shows them again: they are rendered once, and then
copied."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

from pydantic_core import to_json

from neuronpedia_inference.operations.rendering import Spelling, json_pieces, plain_pieces

T = TypeVar("T")


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

    def __init__(self, make: Callable[[T], Any]) -> None:
        """`make` gives the item as it stands in an answer."""
        self._make = make
        self._items: list[T] = []
        self._json: dict[Spelling, bytearray] = {}
        self._n_json: dict[Spelling, int] = {}
        self._plain: dict[Spelling, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> T:
        return self._items[place]

    def add(self, items: Iterable[T]) -> None:
        self._items.extend(items)

    def parts(self, spelling: Spelling) -> Iterator[bytes]:
        kept = self._json.setdefault(spelling, bytearray())
        for item in self._items[self._n_json.get(spelling, 0) :]:
            rendered = bytearray(b"," if kept else b"")
            for piece in json_pieces(self._make(item), spelling, omit_null=False):
                rendered += piece
                yield b""
            kept += rendered
            self._n_json[spelling] = self._n_json.get(spelling, 0) + 1
        yield b"[%b]" % kept

    def plain(self, spelling: Spelling) -> Generator[None, None, list[Any]]:
        kept = self._plain.setdefault(spelling, [])
        for item in self._items[len(kept) :]:
            kept.append((yield from plain_pieces(self._make(item), spelling, omit_null=False)))
        return list(kept)
