"""Answers as JSON: against pydantic's own dump of the same reply, whole; and that the work comes in small steps."""

from __future__ import annotations

import asyncio
import json
import math
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from neuronpedia_inference import pacing
from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.operations import rendering
from neuronpedia_inference.operations.growing import GrowingList
from neuronpedia_inference.operations.rendering import Entries, Rows, Spelling, json_pieces, plain_pieces
from neuronpedia_inference.pacing import paced, paced_pieces
from neuronpedia_inference.schemas.common import ALSO_SNAKE, Reply


class Leaf(Reply):
    feature_index: int
    activation_value: float
    max_values: list[float] = []
    label: str | None = None


class Marked(Reply):
    top_logprobs: Annotated[list[Leaf], ALSO_SNAKE]
    token: str = "NaN"


class Tree(Reply):
    token_strings: list[str]
    leaves: list[Leaf]
    active: dict[str, list[tuple[int, float]]]
    marked: list[Marked]
    is_special: bool | None = None


def made_from(model: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`st.builds` would draw every field a second time, under its alias."""
    return st.fixed_dictionaries(fields).map(lambda given: model(**given))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
floats = st.floats(allow_nan=False, allow_infinity=False)
leaves = made_from(
    Leaf,
    feature_index=st.integers(0, 2**40),
    activation_value=floats,
    max_values=st.lists(floats, max_size=4),
    label=texts | st.none(),
)
marked = made_from(Marked, top_logprobs=st.lists(leaves, max_size=3), token=texts)
trees = made_from(
    Tree,
    token_strings=st.lists(texts, max_size=4),
    leaves=st.lists(leaves, max_size=5),
    active=st.dictionaries(texts, st.lists(st.tuples(st.integers(0, 9), floats), max_size=3), max_size=3),
    marked=st.lists(marked, max_size=3),
    is_special=st.booleans() | st.none(),
)
spellings: st.SearchStrategy[Spelling] = st.sampled_from(["snake", "camel", "both"])


def whole(reply: BaseModel, spelling: Spelling, omit_null: bool) -> dict[str, Any]:
    """What pydantic dumps, with the second spelling of keys added afterwards."""
    snake = reply.model_dump(mode="json", by_alias=False, exclude_none=omit_null)
    camel = reply.model_dump(mode="json", by_alias=True, exclude_none=omit_null)
    if spelling == "both":
        return merged(snake, camel)
    return snake if spelling == "snake" else respelled(camel)


def merged(snake: Any, camel: Any) -> Any:
    if isinstance(snake, dict):
        pairs = zip(snake.items(), camel.items(), strict=True)
        return {key: merged(one, two) for (a, one), (b, two) in pairs for key in (a, b)}
    if isinstance(snake, list):
        return [merged(one, two) for one, two in zip(snake, camel, strict=True)]
    return snake


def respelled(value: Any) -> Any:
    if isinstance(value, dict):
        inner = {key: respelled(item) for key, item in value.items()}
        return {**inner, "top_logprobs": inner["topLogprobs"]} if "topLogprobs" in inner else inner
    return [respelled(item) for item in value] if isinstance(value, list) else value


def text_of(reply: BaseModel, spelling: Spelling = "snake", *, omit_null: bool = False) -> bytes:
    return b"".join(json_pieces(reply, spelling, omit_null=omit_null))


def finished(steps: Generator[None, None, Any]) -> tuple[Any, int]:
    """What the generator returns, and how often it stopped."""
    n_stops = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, n_stops
        n_stops += 1


def lazy(tree: Tree) -> Tree:
    """The same with every list made while it is written."""
    active = list(tree.active.items())
    return Tree.model_construct(
        token_strings=tree.token_strings,
        leaves=Rows(len(tree.leaves), tree.leaves.__getitem__),
        active=Entries(len(active), active.__getitem__),
        marked=Rows(len(tree.marked), tree.marked.__getitem__),
        is_special=tree.is_special,
    )


@given(trees, spellings, st.booleans(), st.integers(1, 20))
def test_json_and_dictionary_equal_the_dump_of_the_whole(
    tree: Tree, spelling: Spelling, omit_null: bool, at_once: int
) -> None:
    expected = whole(tree, spelling, omit_null)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "SCALARS_AT_ONCE", at_once)
        patch.setattr(rendering, "PIECE_BYTES", at_once)
        for reply in (tree, lazy(tree)):
            assert json.loads(text_of(reply, spelling, omit_null=omit_null)) == expected
            assert finished(plain_pieces(reply, spelling, omit_null=omit_null))[0] == expected


def test_the_text_is_compact_utf_8() -> None:
    reply = Marked(top_logprobs=[Leaf(feature_index=1, activation_value=0.1)], token="é NaN Infinity")
    assert text_of(reply, omit_null=True).decode() == (
        '{"top_logprobs":[{"feature_index":1,"activation_value":0.1,"max_values":[]}],"token":"é NaN Infinity"}'
    )


class Growing:
    """Brings its own JSON."""

    def parts(self, spelling: Spelling) -> Iterator[bytes]:
        yield f'{{"{spelling}":'.encode()
        yield b" 1.50}"

    def plain(self, spelling: Spelling) -> Generator[None, None, Any]:
        yield
        return {spelling: 1.5}


def test_rendered_values_are_copied_as_they_are() -> None:
    reply = Marked.model_construct(top_logprobs=Growing(), token=Growing())
    assert text_of(reply, "camel") == (
        b'{"topLogprobs":{"camel": 1.50},"top_logprobs":{"camel": 1.50},"token":{"camel": 1.50}}'
    )
    assert finished(plain_pieces(reply, "snake", omit_null=False))[0] == {
        "top_logprobs": {"snake": 1.5},
        "token": {"snake": 1.5},
    }


def test_rows_are_a_sequence_whose_items_are_made_each_time() -> None:
    made: list[int] = []
    rows = Rows(5, lambda i: made.append(i) or 10 * i)
    assert (len(rows), rows[1], rows[-1], made) == (5, 10, 40, [1, 4])
    assert list(rows) == [0, 10, 20, 30, 40]
    assert list(rows[1:4]) == [10, 20, 30]
    with pytest.raises(IndexError):
        rows[5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["value", "list", "pair", "lazy"])
def test_numbers_that_json_cannot_say_are_refused(bad: float, place: str) -> None:
    good = Leaf(feature_index=1, activation_value=1.0)
    reply = {
        "value": Leaf(feature_index=1, activation_value=bad),
        "list": Leaf(feature_index=1, activation_value=1.0, max_values=[1.0, bad]),
        "pair": Tree(token_strings=[], leaves=[], active={"1": [(1, bad)]}, marked=[]),
        "lazy": Marked.model_construct(
            top_logprobs=Rows(2, [good, Leaf(feature_index=1, activation_value=bad)].__getitem__)
        ),
    }[place]
    for render in (lambda: text_of(reply), lambda: finished(plain_pieces(reply, "snake", omit_null=False))):
        with pytest.raises(EngineFailed, match="not finite"):
            render()


# In pieces


def big() -> Marked:
    """1,000 rows of 2,000 numbers: 36 MB of JSON."""
    row = [index / 7 for index in range(2000)]
    return Marked.model_construct(
        top_logprobs=Rows(1000, lambda i: Leaf.model_construct(feature_index=i, activation_value=0.0, max_values=row)),
        token="",
    )


def test_a_large_answer_comes_in_pieces_of_bounded_size() -> None:
    sizes = [len(piece) for piece in json_pieces(big(), "snake", omit_null=False)]
    assert len(sizes) > 400
    assert max(sizes) <= 2**16
    assert min(sizes[:-1]) >= 2**14


def test_a_large_answer_takes_no_more_memory_than_its_pieces() -> None:
    values = np.arange(200 * 2000, dtype=np.float32).reshape(200, 2000)
    rows = Rows(200, lambda i: Leaf(feature_index=i, activation_value=0.0, max_values=values[i].tolist()))
    reply = Marked.model_construct(top_logprobs=rows, token="")
    tracemalloc.start()
    try:
        n_bytes = sum(map(len, json_pieces(reply, "snake", omit_null=False)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**19 < 2**21 < n_bytes


def test_a_small_answer_is_one_piece() -> None:
    assert len(list(json_pieces(Marked(top_logprobs=[]), "snake", omit_null=False))) == 1


def test_between_two_pieces_few_items_are_made() -> None:
    """The work between two stops is counted in numbers written, which does not depend on the machine."""
    n_made = 0

    def make(i: int) -> Leaf:
        nonlocal n_made
        n_made += 1
        return Leaf(feature_index=i, activation_value=i / 3)

    reply = Marked.model_construct(top_logprobs=Rows(100_000, make), token="")
    before = 0
    for _ in json_pieces(reply, "snake", omit_null=False):
        assert n_made - before <= 1500
        before = n_made
    assert n_made == 100_000


def test_what_is_kept_is_rendered_with_stops_inside_its_items_and_after_one_that_is_cut_off() -> None:
    n_made = 0

    def row(place: int) -> Leaf:
        nonlocal n_made
        n_made += 1
        return Leaf(feature_index=place, activation_value=place / 3)

    kept = GrowingList[int](lambda n: Rows(n, row))
    kept.add([3, 10_000, 0, 5_000])
    reply = Marked.model_construct(top_logprobs=kept, token="")
    cut_off = json_pieces(reply, "snake", omit_null=False)
    while n_made < 5_000:
        next(cut_off)
    cut_off.close()  # pyright: ignore[reportAttributeAccessIssue]  (a generator)
    before, pieces = n_made, list[bytes]()
    for piece in json_pieces(reply, "snake", omit_null=False):
        assert n_made - before <= 1500
        before = n_made
        pieces.append(piece)
    told = json.loads(b"".join(pieces))["top_logprobs"]
    assert [len(rows) for rows in told] == [3, 10_000, 0, 5_000]
    assert told[1] == [json.loads(row(place).model_dump_json(exclude_none=False)) for place in range(10_000)]
    n_made = 0
    assert b"".join(json_pieces(reply, "snake", omit_null=False)) == b"".join(pieces)
    assert n_made == 0, "it is only copied"


def test_a_dictionary_is_built_with_a_stop_at_every_row() -> None:
    built, n_stops = finished(plain_pieces(big(), "snake", omit_null=False))
    assert len(built["top_logprobs"]) == 1000
    assert n_stops >= 1000


# Pacing


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pacing.time, "perf_counter", made)
    return made


def turns_of_others(work: Callable[[], Any]) -> tuple[Any, int]:
    """What the coroutine gives, and how many turns another task had meanwhile."""

    async def both() -> tuple[Any, int]:
        n_turns = 0

        async def other() -> None:
            nonlocal n_turns
            while True:
                n_turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        result = await work()
        task.cancel()
        return result, n_turns

    return asyncio.run(both())


def test_others_have_a_turn_after_every_slice(clock: Clock) -> None:
    def steps() -> Generator[None, None, str]:
        for _ in range(100):
            clock.now_s += 0.001
            yield
        return "done"

    result, n_turns = turns_of_others(lambda: paced(steps()))
    assert result == "done"
    assert 18 <= n_turns <= 21


def test_short_work_does_not_give_way(clock: Clock) -> None:
    def steps() -> Generator[None, None, int]:
        yield from [None] * 100
        return 1

    assert turns_of_others(lambda: paced(steps())) == (1, 0)


def test_pieces_are_paced_likewise_and_empty_ones_are_only_stops(clock: Clock) -> None:
    def pieces() -> Iterator[bytes]:
        for number in range(100):
            clock.now_s += 0.001
            yield b"" if number % 10 else b"%d" % number

    async def collected() -> list[bytes]:
        return [piece async for piece in paced_pieces(pieces())]

    result, n_turns = turns_of_others(collected)
    assert result == [b"%d" % number for number in range(0, 100, 10)]
    assert 18 <= n_turns <= 21
