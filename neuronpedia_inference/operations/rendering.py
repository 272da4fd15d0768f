"""Answers as JSON, written piece by piece, so that whoever sends a large one can give way in between.

An answer is a tree of `Reply`s. A field may hold `Rows` or `Entries`, whose items are made while they are written, or a
`Rendered` value, which brings its own JSON; such a reply is built with `model_construct`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Generic, Literal, Protocol, TypeVar, overload

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.schemas.common import ALSO_SNAKE, IF_ANY

Spelling = Literal["snake", "camel", "both"]
"""How the keys of an answer are written."""

PIECE_BYTES = 2**14
"""A piece ends once it has as many."""
SCALARS_AT_ONCE = 2048
"""Numbers and texts that are written without a stop."""

SCALARS = frozenset({str, int, float, bool, type(None)})

T = TypeVar("T")


class Rows(Sequence[T], Generic[T]):
    """A long list of an answer: item `i` is `make(i)`, made whenever it is asked for and not kept."""

    def __init__(self, n: int, make: Callable[[int], T]) -> None:
        self._n = n
        self._make = make

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[T]:
        return map(self._make, range(self._n))

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> Rows[T]: ...

    def __getitem__(self, place: int | slice) -> T | Rows[T]:
        places = range(self._n)[place]
        if isinstance(places, int):
            return self._make(places)
        return Rows(len(places), lambda i: self._make(places[i]))


class Entries(Rows[tuple[str, Any]]):
    """A long object of an answer: its items are pairs of key and value. The keys are data and have one spelling."""


class Rendered(Protocol):
    """A value that brings its own JSON."""

    def parts(self, spelling: Spelling) -> Iterator[bytes]:
        """Valid JSON, copied as it is, in parts of little work; those that only are work are empty."""
        ...

    def plain(self, spelling: Spelling) -> Generator[None, None, Any]:
        """The same as JSON-ready Python values, with a yield between small steps of the work."""
        ...


def json_pieces(reply: Any, spelling: Spelling, *, omit_null: bool) -> Iterator[bytes]:
    """The JSON of an answer, or of any part of one, in UTF-8, in pieces of 16 to 64 KiB; one piece if it is small.

    Between them there may be empty ones, where work has been done and nothing is to be sent yet. Raises EngineFailed
    where a number is NaN or infinite, which JSON cannot say.
    """
    piece = bytearray()
    for part in _Writer(spelling, omit_null).parts(reply):
        piece += part
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
        elif not part:
            yield part
    if piece:
        yield bytes(piece)


def plain_pieces(reply: Any, spelling: Spelling, *, omit_null: bool) -> Generator[None, None, Any]:
    """The same as JSON-ready values, an answer as a dictionary, with a yield between small steps of the work.

    Raises EngineFailed like `json_pieces`.
    """
    return (yield from _Builder(spelling, omit_null).build(reply))


@dataclass(frozen=True)
class _Field:
    name: str
    keys: tuple[str, ...]
    """As it is written: once, or in both words."""
    json_keys: tuple[bytes, ...]
    """The same with quotes and colon."""
    if_any: bool
    """Whether it is left out where it is null."""


@cache
def _fields(kind: type[BaseModel], spelling: Spelling) -> tuple[_Field, ...]:
    return tuple(_field(kind, name, spelling) for name in kind.model_fields)


def _field(kind: type[BaseModel], name: str, spelling: Spelling) -> _Field:
    about = kind.model_fields[name]
    camel = about.serialization_alias or about.alias or name
    keys = {"snake": (name,), "camel": (camel,), "both": (name, camel)}[spelling]
    if ALSO_SNAKE in about.metadata and spelling == "camel":
        keys = (camel, name)
    keys = tuple(dict.fromkeys(keys))
    return _Field(name, keys, tuple(to_json(key) + b":" for key in keys), IF_ANY in about.metadata)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_leaf(value: Any) -> bool:
    """Neither spelled nor lazy, at any depth; lists are of one kind."""
    if isinstance(value, list | tuple):
        return not value or _is_leaf(value[0])
    return _is_scalar(value)


@cache
def _is_marked(kind: type[BaseModel], spelling: Spelling) -> bool:
    """Whether a field is written in both words, or only where there is something."""
    return any(len(field.keys) > 1 or field.if_any for field in _fields(kind, spelling))


def _leaf_size(value: Any) -> int | None:
    if not _is_leaf(value):
        return None
    n_scalars = _n_scalars(value)
    return n_scalars if n_scalars <= SCALARS_AT_ONCE else None


def _n_scalars(leaf: Any) -> int:
    if not isinstance(leaf, list | tuple) or not leaf:
        return 1
    return len(leaf) * _n_scalars(leaf[0])


class _Walk:
    """What both ways of rendering decide alike. What is small and holds only leaves is left to pydantic."""

    def __init__(self, spelling: Spelling, omit_null: bool) -> None:
        self.spelling: Spelling = spelling
        self.how: dict[str, Any] = {"by_alias": spelling == "camel", "exclude_none": omit_null}

    def fields(self, model: BaseModel) -> list[tuple[_Field, Any]]:
        values = model.__dict__
        pairs = ((field, values[field.name]) for field in _fields(type(model), self.spelling))
        return [pair for pair in pairs if pair[1] is not None or not (self.how["exclude_none"] or pair[0].if_any)]

    def size(self, value: Any) -> int | None:
        """Scalars of what pydantic can write at once and in the wanted spelling; None for anything else."""
        if not isinstance(value, BaseModel):
            return _leaf_size(value)
        if _is_marked(type(value), self.spelling):
            return None
        n_scalars = 0
        for part in value.__dict__.values():
            if type(part) in SCALARS:
                n_scalars += 1
                continue
            size = _leaf_size(part)
            if size is None:
                return None
            n_scalars += size
        return n_scalars if n_scalars <= SCALARS_AT_ONCE else None


class _Writer(_Walk):
    """JSON text."""

    def parts(self, value: Any) -> Iterator[bytes]:
        if self.size(value) is not None:
            yield self._json(value)
        elif isinstance(value, BaseModel):
            yield from self._object((field.json_keys, inner) for field, inner in self.fields(value))
        elif isinstance(value, Entries):
            yield from self._object(((_json_key(key),), inner) for key, inner in value)
        elif isinstance(value, dict):
            yield from self._object(((_json_key(key),), inner) for key, inner in value.items())
        elif isinstance(value, list | tuple) and _is_leaf(value):
            yield from self._long_leaf(value)
        elif isinstance(value, list | tuple | Rows):
            yield from self._array(value)
        else:
            yield from value.parts(self.spelling)

    def _object(self, entries: Iterable[tuple[tuple[bytes, ...], Any]]) -> Iterator[bytes]:
        before = b"{"
        for keys, value in entries:
            for key in keys:
                yield before + key
                yield from self.parts(value)
                before = b","
        yield b"}" if before == b"," else b"{}"

    def _long_leaf(self, items: Sequence[Any]) -> Iterator[bytes]:
        before, left = b"[", iter(items)
        at_once = max(1, SCALARS_AT_ONCE // _n_scalars(items[0]))
        while group := list(islice(left, at_once)):
            yield before + self._json(group)[1:-1]
            before = b","
        yield b"]"

    def _array(self, items: Iterable[Any]) -> Iterator[bytes]:
        """Small items are written in groups."""
        before = b"["
        group: list[Any] = []
        n_scalars = 0
        for item in items:
            size = self.size(item)
            if group and (size is None or n_scalars + size > SCALARS_AT_ONCE):
                yield before + self._json(group)[1:-1]
                before, group, n_scalars = b",", [], 0
            if size is None:
                yield before
                yield from self.parts(item)
                before = b","
            else:
                group.append(item)
                n_scalars += size
        if group:
            yield before + self._json(group)[1:-1]
        yield b"]" if group or before == b"," else b"[]"

    def _json(self, value: Any) -> bytes:
        text = to_json(value, inf_nan_mode="constants", **self.how)
        # Strings may hold these words.
        if (b"NaN" in text or b"Infinity" in text) and not _is_strict(text):
            raise _not_finite()
        return text


def _json_key(key: str) -> bytes:
    return to_json(key) + b":"


def _is_strict(text: bytes) -> bool:
    try:
        from_json(text, allow_inf_nan=False)
    except ValueError:
        return False
    return True


class _Builder(_Walk):
    """Python values."""

    def build(self, value: Any) -> Generator[None, None, Any]:
        if _is_scalar(value):
            return _finite(value)
        if isinstance(value, BaseModel):
            return (yield from self._model(value))
        if isinstance(value, Entries):
            return (yield from self._object(((key,), inner) for key, inner in value))
        if isinstance(value, dict):
            return (yield from self._object(((key,), inner) for key, inner in value.items()))
        if isinstance(value, list | tuple) and (not value or _is_scalar(value[0])):
            return (yield from self._scalars(value))
        if isinstance(value, list | tuple | Rows):
            built: list[Any] = []
            for item in value:
                built.append((yield from self.build(item)))
                yield
            return built
        return (yield from value.plain(self.spelling))

    def _model(self, model: BaseModel) -> Generator[None, None, dict[str, Any]]:
        if self.size(model) is None:
            return (yield from self._object((field.keys, inner) for field, inner in self.fields(model)))
        for value in model.__dict__.values():
            yield from self.build(value)  # for the check of its numbers
        return model.model_dump(mode="json", **self.how)

    def _object(self, entries: Iterable[tuple[tuple[str, ...], Any]]) -> Generator[None, None, dict[str, Any]]:
        built: dict[str, Any] = {}
        for keys, value in entries:
            built |= dict.fromkeys(keys, (yield from self.build(value)))
            yield
        return built

    def _scalars(self, items: Sequence[Any]) -> Generator[None, None, list[Any]]:
        built: list[Any] = []
        left = iter(items)
        while group := list(islice(left, SCALARS_AT_ONCE)):
            built += map(_finite, group)
            yield
        return built


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise _not_finite()
    return value


def _not_finite() -> EngineFailed:
    return EngineFailed("The model produced a number that is not finite, so there is no answer")
