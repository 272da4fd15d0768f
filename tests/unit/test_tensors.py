"""Files of tensors: written in small steps, and read by the format's own library."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import TypeVar

import numpy as np
import pytest
from safetensors.numpy import load

from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.operations.tensors import PIECE_BYTES, tensor_file
from neuronpedia_inference.schemas.common import Reply
from neuronpedia_inference.tensor_files import answer_in

T = TypeVar("T")
TEXTS = ['"quoted"', "back\\slash", "line\nfeed", "\x00\x1f", "é 漢字 🙂", "", "</script>"]


class About(Reply):
    """What goes beside tensors."""

    texts: list[str]
    numbers: list[float]


def made(steps: Generator[None, None, T]) -> tuple[T, int]:
    """What the generator returns, and in how many steps."""
    n_steps = 1
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, n_steps
        n_steps += 1


def test_a_file_is_read_by_the_library_and_says_all_that_is_no_tensor() -> None:
    """Numbers that lie otherwise in memory, half ones, none at all, and names with signs of their own."""
    numbers = np.arange(600, dtype=np.float32).reshape(20, 30)
    arrays = {
        "0/blocks.3.hook_resid_post": numbers,
        'a "name"': numbers.T,
        "every other": numbers[::2, ::3],
        "half": numbers.astype(np.float16),
        "whole": np.arange(5, dtype=np.int64),
        "none": np.empty((0, 7), dtype=np.float32),
    }
    about = About.model_construct(texts=TEXTS, numbers=[0.1, 1e-30])
    file, _ = made(tensor_file(arrays, about, "snake"))
    content = b"".join(file)
    assert len(content) == file.n_bytes
    found = load(content)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert answer_in(content) == {"texts": TEXTS, "numbers": [0.1, 1e-30]}


def test_a_file_without_tensors_is_one_too() -> None:
    file, _ = made(tensor_file({}, About.model_construct(texts=[], numbers=[]), "snake"))
    assert load(b"".join(file)) == {}


def test_a_long_header_takes_many_steps_and_long_tensors_leave_in_pieces() -> None:
    texts = Rows(20_000, lambda place: f"{place} {TEXTS[place % len(TEXTS)]}")
    arrays = {str(number): np.full(PIECE_BYTES // 4 + 1, number, dtype=np.float32) for number in range(50)}
    file, n_steps = made(tensor_file(arrays, About.model_construct(texts=texts, numbers=[]), "snake"))
    head, *pieces = file
    assert n_steps > len(arrays) + 10
    assert len(pieces) == 2 * len(arrays)
    assert max(map(len, pieces)) == PIECE_BYTES
    assert answer_in(b"".join((head, *pieces)))["texts"] == list(texts)
    assert json.loads(head[8:])["49"]["data_offsets"][1] == file.n_bytes - len(head)


def test_what_json_cannot_say_is_no_answer() -> None:
    with pytest.raises(EngineFailed, match="not finite"):
        made(tensor_file({}, About.model_construct(texts=[], numbers=[float("nan")]), "snake"))
