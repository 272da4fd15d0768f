"""What the benchmark of stalls counts, on data of which the counts are known."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stalls_asks import BODY_BYTES, MOST_STEERS, N_STEERS, largest_steer, many_steers, nested_lists
from benchmarks.stalls_client import Frames, markdown, quantile
from neuronpedia_inference.operations import by_name


@given(st.lists(st.sampled_from([b"data: 1\n\n", b"data: 22\n\n", b"\n\n", b"event: a\ndata: 3\n\n"])), st.data())
def test_events_are_counted_however_their_bytes_come(events: list[bytes], data: st.DataObject) -> None:
    sent = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=8)))
    frames = Frames()
    for number, (start, end) in enumerate(pairwise([0, *cuts, len(sent)])):
        frames.feed(sent[start:end], float(number))
    assert frames.sizes == [len(event) for event in events]
    ends = [sum(map(len, events[: n + 1])) for n in range(len(events))]
    assert frames.arrived_s == [float(sum(cut < end for cut in cuts)) for end in ends]


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_quantiles(share: float, value: float) -> None:
    assert quantile(list(range(100, 0, -1)), share) == value


def test_a_table_has_the_columns_of_its_first_row() -> None:
    rows = [{"a": 1234567, "b": "x"}, {"b": None, "a": 0.25, "c": 1}]
    assert markdown(rows) == "| a | b |\n| --- | --- |\n| 1,234,567 | x |\n| 0.25 | - |"


def test_large_bodies_are_as_large_as_they_may_be() -> None:
    nested, steers = nested_lists(), many_steers()
    assert BODY_BYTES - 3 <= len(nested) <= BODY_BYTES
    assert set(map(len, json.loads(nested)["x"])) == {0}
    assert len(json.loads(steers)["features"]) == N_STEERS
    by_name["steer"].request.model_validate(largest_steer())
    assert len(largest_steer()["vectors"]) == MOST_STEERS
    assert len(json.dumps(largest_steer())) <= BODY_BYTES
