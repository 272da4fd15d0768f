"""Answers as tensors: the safetensors format, written piece by piece from arrays as they lie in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.operations.rendering import Entries, Rows, Spelling, json_pieces

PIECE_BYTES = 2**18
DTYPES = {"float32": "F32", "float16": "F16"}


class Arrays(Entries):
    """Arrays by name as an object of an answer; as tensors they leave as they are."""

    def __init__(self, arrays: Mapping[str, Numbers], *, prefix: str = "") -> None:
        """arrays: each [n, width]; prefix: of their names in a file."""
        self.named = {prefix + name: array for name, array in arrays.items()}
        names = list(arrays)
        super().__init__(len(names), lambda place: (names[place], _rows(arrays[names[place]])))


def _rows(array: Numbers) -> Rows[list[float]]:
    return Rows(len(array), lambda row: array[row].tolist())


def tensor_pieces(arrays: Mapping[str, Numbers], about: BaseModel, spelling: Spelling) -> Iterator[bytes]:
    """A file of tensors in C order: header, then the bytes of one after the other.

    about: everything else that is to be said, which becomes JSON under `answer` in the metadata.
    """
    said = b"".join(json_pieces(about, spelling, omit_null=False)).decode()
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "answer": said}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        content = array.data.cast("B")
        for first in range(0, len(content), PIECE_BYTES):
            yield bytes(content[first : first + PIECE_BYTES])
