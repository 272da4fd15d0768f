"""Answers as tensors: the safetensors format, written piece by piece from arrays as they lie in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.operations.rendering import Entries, Rows, Spelling, json_pieces
from neuronpedia_inference.tensor_files import NAMES

PIECE_BYTES = 2**18
KINDS = {dtype: kind for kind, dtype in NAMES.items()}


class Columns(Rows[Any]):
    """Part of an answer whose numbers are arrays: as JSON its rows are made of them, as tensors they leave as they are.

    named: the arrays, by their names in a file. bare: what stays of a row without them; None where nothing does.
    """

    def __init__(
        self,
        n: int,
        make: Callable[[int], Any],
        named: Mapping[str, Numbers],
        bare: Callable[[int], Any] | None = None,
    ) -> None:
        super().__init__(n, make)
        self.named = named
        self.without: Any = [] if bare is None else Rows(n, bare)

    @classmethod
    def of(cls, name: str, array: Numbers) -> Columns:
        """A list of numbers, or of lists of numbers."""
        return cls(len(array), lambda place: array[place].tolist(), {name: array})


class Arrays(Entries):
    """Arrays by name as an object of an answer; as tensors they leave as they are."""

    without: Any = {}

    def __init__(self, arrays: Mapping[str, Numbers], *, prefix: str = "") -> None:
        """arrays: each [n, width]; prefix: of their names in a file."""
        self.named = {prefix + name: array for name, array in arrays.items()}
        names = list(arrays)
        super().__init__(len(names), lambda place: (names[place], _rows(arrays[names[place]])))


class Pairs(Entries):
    """As Columns, for an object of an answer."""

    without: Any = {}

    def __init__(self, n: int, make: Callable[[int], tuple[str, Any]], named: Mapping[str, Numbers]) -> None:
        super().__init__(n, make)
        self.named = named


def _rows(array: Numbers) -> Rows[list[float]]:
    return Rows(len(array), lambda row: array[row].tolist())


def prefix_of(number: int, *, is_listed: bool) -> str:
    """Of the names of one text's tensors: its number from 0 where texts came as a list, of one too; else nothing."""
    return f"{number}/" if is_listed else ""


def apart(reply: BaseModel) -> tuple[dict[str, Numbers], BaseModel]:
    """The arrays of an answer by their names in a file, and the answer without them."""
    named: dict[str, Numbers] = {}
    return named, _without(reply, named)


def _without(value: Any, named: dict[str, Numbers]) -> Any:
    if isinstance(value, Columns | Arrays | Pairs):
        named.update(value.named)
        return value.without
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: _without(inner, named) for name, inner in value.__dict__.items()})
    if isinstance(value, list | Rows) and value and isinstance(value[0], BaseModel):
        return [_without(inner, named) for inner in value]
    return value


class TensorFile:
    """A file of tensors in C order: header, then the bytes of one after the other, made as it is iterated over."""

    def __init__(self, head: bytes, arrays: Sequence[Numbers]) -> None:
        self._head = head
        self._arrays = arrays
        self.n_bytes = len(head) + sum(array.nbytes for array in arrays)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        for array in self._arrays:
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            for first in range(0, len(content), PIECE_BYTES):
                yield bytes(content[first : first + PIECE_BYTES])


def tensor_file(
    arrays: Mapping[str, Numbers], about: BaseModel, spelling: Spelling
) -> Generator[None, None, TensorFile]:
    """With a yield between small steps of the work: the header has to be whole before anything of it can leave.

    about: everything else that is to be said, which becomes JSON under `answer` in the metadata. Raises EngineFailed if
    a number in it is not finite.
    """
    parts = ['{"__metadata__":{"format":"pt","answer":"']
    for piece in json_pieces(about, spelling, omit_null=False):
        parts.append(json.dumps(piece.decode())[1:-1])
        yield
    parts.append('"}')
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        where = {"dtype": KINDS[str(array.dtype)], "shape": array.shape, "data_offsets": (start, end)}
        parts.append(f",{json.dumps(name)}:{json.dumps(where, separators=(',', ':'))}")
        yield
    text = "".join((*parts, "}")).encode()
    text += b" " * (-len(text) % 8)
    return TensorFile(len(text).to_bytes(8, "little") + text, [*arrays.values()])
