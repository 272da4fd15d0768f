"""Tensors in safetensors files, read to the page: rows and columns without what lies beside them.

The safetensors library maps a file, and of a mapping the kernel reads ahead, dozens of pages for each number of a
column. Here every read is of the bytes that are wanted, with reading ahead turned off. A file that has been cut off
gives an error, where a mapping would end the process.

    8 bytes     length of the header, little endian
    header      JSON: by name dtype, shape and data_offsets, counted from the header's end
    tensors     row by row, little endian
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PAGE = 4096
_MOST_HEADER = 2**26


@dataclass(frozen=True, slots=True)
class Version:
    """By which a file is known again."""

    n_bytes: int
    changed_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor. Every read raises OSError where the file has changed since its header was read."""

    file: Path
    version: Version
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its first byte, in the file."""

    def whole(self) -> Tensor:
        return self._read(0, prod(self.shape)).reshape(self.shape)

    def row(self, index: int) -> Tensor:
        """Of the first axis: [*shape[1:]]"""
        size = prod(self.shape[1:])
        return self._read(index * size, size).reshape(self.shape[1:])

    def column(self, index: int) -> Tensor:
        """Of a matrix: [rows]. One page for each row at the most."""
        n_rows, n_columns = self.shape
        if n_columns * self.dtype.itemsize <= PAGE:  # every page has a number of it
            return self._read(0, n_rows * n_columns).reshape(self.shape)[:, index].clone()
        return self._gather(range(index, n_rows * n_columns, n_columns))

    def _read(self, first: int, n_numbers: int) -> Tensor:
        item = self.dtype.itemsize
        with _opened(self.file, self.version) as file:
            return self._tensor(_bytes(file, self.start + first * item, n_numbers * item))

    def _gather(self, places: range) -> Tensor:
        item, start = self.dtype.itemsize, self.start
        with _opened(self.file, self.version) as file:
            return self._tensor(b"".join(_bytes(file, start + place * item, item) for place in places))

    def _tensor(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=self.dtype)


def tensors_in(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, by name, from its header. Raises OSError, and ValueError for another file."""
    with _opened(file) as opened:
        version = _version(opened)
        try:
            (length,) = struct.unpack("<Q", _bytes(opened, 0, 8))
            if length > min(_MOST_HEADER, version.n_bytes - 8):
                raise ValueError("it is cut off")
            header = json.loads(_bytes(opened, 8, length))
            header.pop("__metadata__", None)
            return {name: _stored(file, version, about, 8 + length) for name, about in header.items()}
        except (struct.error, ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ValueError(f"{str(file)!r} is no safetensors file that can be read: {exc}") from None


def _stored(file: Path, version: Version, about: dict[str, Any], data: int) -> Stored:
    dtype, shape = DTYPES.get(about["dtype"]), tuple(map(int, about["shape"]))
    first, last = about["data_offsets"]
    if dtype is None:
        raise ValueError(f"{about['dtype']} is no precision that is read here")
    if last - first != prod(shape) * dtype.itemsize or first < 0 or data + last > version.n_bytes:
        raise ValueError("a tensor lies outside of it")
    return Stored(file, version, dtype, shape, data + first)


@contextmanager
def _opened(file: Path, version: Version | None = None) -> Iterator[int]:
    """version: which it must be still."""
    opened = os.open(file, os.O_RDONLY)
    try:
        if version is not None and _version(opened) != version:
            raise OSError(f"{str(file)!r} has changed since it was described")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM)
        yield opened
    finally:
        os.close(opened)


def _version(file: int) -> Version:
    about = os.fstat(file)
    return Version(about.st_size, about.st_mtime_ns, about.st_ino)


def _bytes(file: int, start: int, n_bytes: int) -> bytes:
    data = os.pread(file, n_bytes, start)
    while len(data) < n_bytes:  # the kernel gives 2 GiB at once, and less where the file ends
        more = os.pread(file, n_bytes - len(data), start + len(data))
        if not more:
            raise OSError("the file ends before the tensor does")
        data += more
    return data
