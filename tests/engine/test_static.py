"""The step of fixed shape against rows alone, and that nothing in it keeps a CUDA graph from holding it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuronpedia_inference.costs import Grid
from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.engine import generation, static
from neuronpedia_inference.engine.cache import MaskForm
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.merging import why_not_record
from neuronpedia_inference.engine.probe import IDS
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from neuronpedia_inference.engine.static import Step, as_cuda_graph
from tests import models
from tests.engine.engines import engine
from tests.engine.test_failures import FailsAt
from tests.engine.test_merging import PROMPTS, alone, ids, staggered, steering


def as_it_is(step: Step) -> Step:
    """Recorded as nothing: it runs operation by operation."""
    return step


def additive_rows(family: str) -> list[RowSpec]:
    """At the borders of all three layers, two on one row, and some rows without."""
    rows = []
    for number, prompt in enumerate([*PROMPTS, *PROMPTS]):
        place = ("hook_resid_pre", "hook_resid_post")[number % 2]
        steers = [steering(family, place, Do.ADD, (number + n) % 3, number + n) for n in range(2)]
        rows.append(RowSpec(prompt, Sampling(5 + 3 * number % 13), tuple(steers[: number % 3])))
    return rows


@pytest.mark.parametrize("family", models.CONFIGS)
def test_equals_rows_alone_and_is_recorded_once_per_shape(family: str) -> None:
    recorded: list[Step] = []

    def record(step: Step) -> Step:
        recorded.append(step)
        step()  # as recording would
        return step

    rows = additive_rows(family)
    lane = Lane.merging(engine(family).decoder, MaskForm.ADDITIVE, record)
    for _ in range(2):
        for row, steps in zip(rows, staggered(lane, rows, 3), strict=True):
            assert ids(steps) == alone(family, row), row.edits
    assert len(recorded) <= 5  # 1, 2, 4, 8 and 16 rows; the second round finds them
    steered = next(row for row in rows if row.edits)
    assert alone(family, steered) != alone(family, replace(steered, edits=()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_that_do_not_fit_the_tables_take_the_other_way(family: str) -> None:
    """All rows of a step, while such a row is among them."""
    capped = steering(family, "hook_resid_post", Do.CAP, 1, 3)
    rows = [*additive_rows(family)[:5], RowSpec(PROMPTS[2], Sampling(4), (capped,)), *additive_rows(family)[5:8]]
    lane = Lane.merging(engine(family).decoder, MaskForm.ADDITIVE, as_it_is)
    for row, steps in zip(rows, staggered(lane, rows, 2), strict=True):
        assert ids(steps) == alone(family, row)


class NoHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values read by the host, and copies from the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "_to_copy", "unique", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        wanted = (kwargs or {}).get("device")
        assert name not in self.FORBIDDEN or (name == "_to_copy" and wanted is None), f"the step calls {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", models.CONFIGS)
def test_the_step_reads_nothing_on_the_host_and_its_tensors_stay(family: str) -> None:
    addresses: dict[Any, set[Sequence[int]]] = {}
    n_steps = []

    def record(step: Any) -> Step:
        static = step.__self__

        def watched() -> Tensor:
            with NoHost():
                logits = step()
            held = [t.data_ptr() for layer in lane.memory.layers for t in (layer.keys, layer.values)]  # pyright: ignore
            own = [static._ids.data_ptr(), static._added.data_ptr(), static.cache.positions.data_ptr()]
            addresses.setdefault(static, set()).add((*own, *held))
            n_steps.append(len(logits))
            return logits

        return watched

    rows = [row for row in additive_rows(family) if len(row.prompt_ids) < 10][:4]
    lane = Lane.merging(engine(family).decoder, MaskForm.ADDITIVE, record)
    with torch.inference_mode():
        lane.prefill([(RowId(n, 0), replace(row, sampling=Sampling(9 - n))) for n, row in enumerate(rows)])
        while lane.rows:
            lane.decode()
    assert n_steps == [4] * 6 + [2] + [1], "slots that ran: four for three rows too"
    assert [len(found) for found in addresses.values()] == [1, 1, 1]


class Tape(TorchDispatchMode):
    """Records as a CUDA graph does: a replay runs the operations again, on the tensors that they had then, and writes
    into those that they gave then. Nothing of Python is run again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        for func, args, kwargs, found in self._calls:
            again = tree_leaves(func(*args, **kwargs))
            for then, now in zip(tree_leaves(found), again, strict=True):
                if isinstance(then, Tensor) and then.data_ptr() != now.data_ptr():
                    then.copy_(now)


def taped(step: Step) -> Step:
    with Tape() as tape:
        logits = step()

    def replay() -> Tensor:
        tape.replay()
        return logits

    return replay


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that has to grow."""
    for module in (static, generation):
        monkeypatch.setattr(module, "RECORDED_GRID", Grid(1, 64))


def finished(lane: Lane, steps: list[RowStep]) -> dict[int, list[int]]:
    while lane.rows:
        steps = [*steps, *lane.decode()]
    return {n: [step.token_id for step in steps if step.row.job == n] for n in range(8)}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_recorded_step_replays_right_after_the_batch_has_changed_kind_and_size_and_back(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    recorded: list[Step] = []

    def record(step: Step) -> Step:
        recorded.append(step)
        return taped(step)

    capped = steering(family, "hook_resid_post", Do.CAP, 1, 3)
    added = steering(family, "hook_resid_post", Do.ADD, 1, 4)
    rows = [
        RowSpec(PROMPTS[0], Sampling(28), (added,)),
        RowSpec(PROMPTS[2], Sampling(4), (capped,)),
        RowSpec(PROMPTS[3], Sampling(26)),
        RowSpec(PROMPTS[4], Sampling(70), (replace(added, amount=-added.amount),)),
        RowSpec(PROMPTS[5], Sampling(5), (capped,)),
    ]
    lane = Lane.merging(engine(family).decoder, MaskForm.ADDITIVE, record)
    steps: list[RowStep] = []
    n_recorded = []
    with torch.inference_mode():
        for joining in ([0, 2], [1], [3], [4]):
            steps += lane.prefill([(RowId(n, 0), rows[n]) for n in joining])
            for _ in range(7):
                steps += lane.decode()
            n_recorded.append(len(recorded))
        found = finished(lane, steps)
    for n, row in enumerate(rows):
        assert found[n] == alone(family, row), n
    assert alone(family, rows[0]) != alone(family, replace(rows[0], edits=()))
    # Two rows, then one of another kind, for which the slots grow; three, and a longer one; those who stay, then fewer.
    assert n_recorded == [1, 2, 3, 5]


def test_a_recorded_step_replays_right_after_a_growth_that_failed_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have grown, the others have not: what was recorded writes to tensors that are no more."""
    small(monkeypatch)
    rows = [RowSpec(PROMPTS[0], Sampling(12)), RowSpec(PROMPTS[4], Sampling(90))]
    expected = [alone("llama", row) for row in rows]
    n, n_failed, mode = 0, 0, FailsAt(0)
    while mode.seen >= n:
        n += 3
        mode = FailsAt(n)
        lane = Lane.merging(engine("llama").decoder, MaskForm.ADDITIVE, taped)
        with torch.inference_mode():
            steps = lane.prefill([(RowId(0, 0), rows[0])])
            steps += [*lane.decode(), *lane.decode()]
            joined: list[RowStep] = []
            with suppress(torch.OutOfMemoryError), mode:
                joined = lane.prefill([(RowId(1, 0), rows[1])])
            found = finished(lane, [*steps, *joined])
        assert found[0] == expected[0], n
        assert found[1] == (expected[1] if joined else []), n
        n_failed += not joined
    assert n_failed > 5


def test_logits_of_a_step_are_not_those_of_the_next() -> None:
    """Kept over several steps, as the comparison at start keeps them; in float32 there is no conversion that copies."""
    with torch.inference_mode():
        assert why_not_record(engine("llama").decoder, MaskForm.ADDITIVE, taped, IDS) == ""


def test_without_a_card_the_reason_is_said() -> None:
    with torch.inference_mode(False):
        asked = ModelEngine(models.model("llama"), model_id="llama", name="llama", stop_ids=(), graphs=True)
    assert asked.graphs_off_because == "the device is cpu"
    assert engine("llama").graphs_off_because == "CUDA_GRAPHS is off"


def test_a_recording_that_differs_is_found() -> None:
    decoder = engine("llama").decoder
    with torch.inference_mode():
        assert why_not_record(decoder, MaskForm.ADDITIVE, as_it_is, IDS) == ""
        rolled = why_not_record(decoder, MaskForm.ADDITIVE, lambda step: lambda: step().roll(1, -1), IDS)
        assert "different" in rolled
        assert "another form" in why_not_record(decoder, MaskForm.LENGTHS, as_it_is, IDS)
        assert "do not decode together" in why_not_record(decoder, "", as_it_is, IDS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", models.CONFIGS)
def test_replayed_on_a_card(family: str) -> None:
    with torch.inference_mode(False):
        net: Any = models.model(family)
        net.to("cuda")
        built = ModelEngine(net, model_id=family, name=family, stop_ids=(), graphs=True)
    try:
        assert built.graphs_off_because == ""
        rows = additive_rows(family)
        merged = staggered(built.lane, rows, 3)
        plain = staggered(Lane.merging(built.decoder, MaskForm.ADDITIVE), rows, 3)
        assert [ids(steps) for steps in merged] == [ids(steps) for steps in plain]
        with torch.inference_mode():
            assert why_not_record(built.decoder, MaskForm.ADDITIVE, as_cuda_graph, IDS) == ""
    finally:
        net.to("cpu")
