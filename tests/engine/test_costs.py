"""What a request is said to take against what torch allocates while it runs."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from neuronpedia_inference.costs import COLUMNS_AT_ONCE, Costs, Demand, together
from neuronpedia_inference.domain import Sampling, Tokens
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.select import Selection
from neuronpedia_inference.engine.cache import RowCache
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.memory import free_bytes
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from neuronpedia_inference.operations import by_name, validate
from neuronpedia_inference.points import PATTERN, Point
from neuronpedia_inference.questions.checks import check_vector
from neuronpedia_inference.questions.states import States
from neuronpedia_inference.web.parsing import parsed
from tests import models
from tests.allocation import allocated_at_the_peak
from tests.edits_by_hand import Hand, sae
from tests.engine.engines import engine


def costs(family: str) -> Costs:
    return Costs(engine(family).model_info(has_bos=True, has_chat_template=False, known_names=()))


def prompt(length: int) -> tuple[int, ...]:
    return tuple(2 + n % 200 for n in range(length))


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize(("lengths", "layer"), [([1], 0), ([40], 2), ([200], 2), ([60, 50, 20], 2), ([9] * 12, 1)])
@pytest.mark.parametrize("place", ["hook_resid_post", "hook_mlp_out", PATTERN])
def test_a_capture_stays_within_its_demand(family: str, lengths: Sequence[int], layer: int, place: str) -> None:
    built, point = engine(family), Point(layer, place)
    patterns = int(place == PATTERN)
    widths = [] if patterns else [built.width(point)]
    pattern = built.makes_pattern([point])
    demand = costs(family).capture(lengths, widths, 0, pattern=pattern, n_patterns=patterns)
    assert demand.tokens == sum(lengths)
    taken = allocated_at_the_peak(lambda: built.capture([prompt(n) for n in lengths], [point]))
    assert taken <= demand.bytes


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("positions", ["all", "mean"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_answered_of_a_capture_stays_within_its_demand(family: str, positions: Any, precision: Any) -> None:
    """The pass, what is held of it, and the vectors that leave, at every layer."""
    built = engine(family)
    points = [Point(layer, "hook_resid_post") for layer in range(built.n_layers)]
    texts = [Tokens(prompt(n), ("t",) * n, (False,) * n, False) for n in (120, 40)]
    width = sum(built.width(point) for point in points)
    n_numbers = width * (160 if positions == "all" else 2)
    question = States(texts, points, positions, n_numbers, precision)

    found: list[Any] = []

    def reduced() -> Generator[Any, Any, None]:
        weights: Any = None
        captured = built.capture([one.ids for one in texts], points)
        found.extend((yield from question.reduce(captured, weights)))

    def run() -> None:
        for _ in reduced():
            pass

    widths = [built.width(point) for point in points]
    demand = costs(family).capture([120, 40], widths, question.n_bytes, pattern=False)
    assert allocated_at_the_peak(run) <= demand.bytes
    assert sum(array.size for one in found for array in one.values()) == n_numbers


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize(("n_rows", "n_prompt", "n_new"), [(1, 5, 90), (2, 100, 60), (1, 200, 3)])
def test_a_generation_stays_within_its_demand(family: str, n_rows: int, n_prompt: int, n_new: int) -> None:
    lane = engine(family).lane
    rows = [(RowId(0, n), RowSpec(prompt(n_prompt), Sampling(n_new))) for n in range(n_rows)]

    def run() -> None:
        lane.prefill(rows)
        while lane.rows:
            lane.decode()

    pattern = engine(family).makes_pattern([])
    known = costs(family)
    demand = together([known.generation(n_rows, n_prompt, n_new, pattern=pattern)], known.position_bytes)
    assert (demand.rows, demand.tokens) == (n_rows, n_rows * n_prompt)
    assert allocated_at_the_peak(run) <= demand.bytes


@pytest.mark.parametrize(("n_edits", "n_prompt"), [(1, 5), (24, 5), (24, 200), (1, 200)])
def test_edits_stay_within_their_demand(n_edits: int, n_prompt: int) -> None:
    """Features that are set, each on positions of its own, so that nothing of them can be shared."""
    lane = engine("llama").lane
    of = sae("jumprelu")
    hands = [Hand(Do.CLAMP, 1, "hook_resid_post", 3.0, of=of, index=n) for n in range(n_edits)]
    edits = tuple(replace(hand, on=Selection(start=n)).resolved() for n, hand in enumerate(hands))
    row = RowSpec(prompt(n_prompt), Sampling(9), edits)

    def run() -> None:
        lane.prefill([(RowId(0, 0), row)])
        while lane.rows:
            lane.decode()

    known = costs("llama")
    pattern = engine("llama").makes_pattern([])
    asked = known.generation(1, n_prompt, 9, n_edits=n_edits, pattern=pattern)
    demand = together([asked], known.position_bytes)
    assert allocated_at_the_peak(run) <= demand.bytes


def test_slots_hold_what_the_formula_says() -> None:
    built = engine("llama")
    lane = built.lane
    assert isinstance(lane, Lane)
    assert isinstance(lane.memory, RowCache)
    rows = [(RowId(0, n), RowSpec(prompt(30), Sampling(80))) for n in range(3)]
    with torch.inference_mode():
        lane.prefill(rows)
    layers: Any = lane.memory.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    lane.drop({row for row, _ in rows})
    assert held == 3 * COLUMNS_AT_ONCE * costs("llama").position_bytes


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_slots_stay_within_what_was_admitted_whoever_comes_goes_and_is_parked(family: str) -> None:
    """Many short rows, then a few long ones, then few: never most rows ever × most columns ever."""
    lane, known = engine(family).lane, costs(family)
    assert isinstance(lane, Lane)
    memory: Any = lane.memory
    inside: dict[RowId, Demand] = {}
    peaks: list[float] = []
    admitted = [0]

    def step(act: Callable[[], Sequence[RowStep]]) -> None:
        held = sum(t.nbytes for layer in memory.layers for t in (layer.keys, layer.values) if t is not None)
        peak = allocated_at_the_peak(lambda: ended.extend(step.row for step in act() if step.ends))
        admitted.append(together(inside.values(), known.position_bytes).bytes)
        peaks.append((held + peak) / max(admitted[-2:]))  # those who left in a step make room in the next
        for row in ended:
            inside.pop(row, None)

    def join(first: int, n_rows: int, n_prompt: int, n_new: int) -> None:
        rows = [(RowId(first + n, 0), RowSpec(prompt(n_prompt), Sampling(n_new))) for n in range(n_rows)]
        for id_, _ in rows:
            inside[id_] = known.generation(1, n_prompt, n_new, pattern=engine(family).makes_pattern([]))
        step(lambda: lane.prefill(rows))

    ended: list[RowId] = []
    with torch.inference_mode():
        join(0, 12, 5, 12)
        lane.park({RowId(n, 0) for n in range(4)})
        join(20, 1, 600, 300)
        for _ in range(14):
            step(lane.decode)
        lane.resume({RowId(n, 0) for n in range(4)})
        join(30, 2, 300, 9)
        for _ in range(20):
            step(lane.decode)
        assert set(inside) == {RowId(20, 0)}
        assert memory.grid.slots <= 2
        lane.drop(set(inside))
    assert max(peaks) <= 1.2, peaks


def test_free_memory_is_measured() -> None:
    """Others give memory back now and then, but not every time."""

    def is_less() -> bool:
        free = free_bytes(torch.device("cpu"))
        held = torch.ones(2**26)  # 256 MiB
        return 0 < free_bytes(torch.device("cpu")) < free and bool(held.sum() == 2**26)

    assert any(is_less() for _ in range(20))


def test_vectors_that_came_with_a_request_are_counted_as_they_are_read_and_checked() -> None:
    """The body's text, its numbers as Python reads them, and the check of each vector."""
    vector = [round(0.01 * n, 6) for n in range(576)]
    steers = [{"hook": "blocks.1.hook_resid_post", "vector": vector, "strength": 0.5} for _ in range(100)]
    raw = json.dumps({"prompt": "a", "vectors": steers}).encode()
    n_numbers = 100 * 576
    plain = costs("llama").generation(1, 5, 9, pattern=False)
    more = costs("llama").generation(1, 5, 9, n_numbers=n_numbers, pattern=False)
    tracemalloc.start()
    try:
        text = bytes(raw)
        body = exhausted(parsed(text))
        request: Any = validate(by_name["steer"], body)
        for one in request.vectors:
            check_vector(one.vector, 576, one.hook)
        taken = tracemalloc.get_traced_memory()[1] + len(text) + 4 * n_numbers
    finally:
        tracemalloc.stop()
    assert taken <= more.bytes - plain.bytes


def exhausted(steps: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
