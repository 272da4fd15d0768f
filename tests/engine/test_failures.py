"""Whatever raises inside a lane or a worker ends its own rows; everybody else's tokens are those they get alone.

Failures are put into every operation of torch in turn: those that allocate, those that copy, those that draw.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.engine.cache import MaskForm
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.faults import as_inference_error
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from neuronpedia_inference.engine.sampling import Sampler
from neuronpedia_inference.errors import EngineFailed, InvalidRequest, OutOfMemory
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.points import Point
from neuronpedia_inference.scheduler.jobs import CaptureWork, GenerateWork, Steps, Ticket
from neuronpedia_inference.scheduler.policy import Limits
from neuronpedia_inference.scheduler.worker import Worker
from neuronpedia_inference.watches.readings import VectorReading
from tests import models
from tests.engine.engines import engine
from tests.engine.test_merging import PROMPTS, alone, ids, steering

FAMILY = "llama"
STRIDE = 101
SAMPLED = Sampling(6, temperature=0.8, freq_penalty=0.5, seed=3, n_logprobs=2)


class FailsAt(TorchDispatchMode):
    """Raises in the n-th operation that is no view, once; counts them all."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.seen = n, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += not func.is_view
        if self.seen == self.n and not func.is_view:
            raise torch.OutOfMemoryError(f"injected into {func}")
        return func(*args, **(kwargs or {}))


@cache
def rows() -> list[RowSpec]:
    """Made before any worker runs: making them runs the model that workers share."""
    return [
        RowSpec(PROMPTS[0], Sampling(9), (steering(FAMILY, "hook_resid_post", Do.CAP, 1, 1),)),
        RowSpec(PROMPTS[2], Sampling(12)),
        RowSpec(PROMPTS[4], SAMPLED, (steering(FAMILY, "hook_resid_pre", Do.ADD, 1, 2),)),
    ]


def to_the_end(lane: Lane, steps: list[RowStep]) -> dict[int, list[RowStep]]:
    while lane.rows:
        steps = [*steps, *lane.decode()]
    return {n: [step for step in steps if step.row.job == n] for n in range(9)}


def by_itself(spec: RowSpec) -> list[RowStep]:
    lane = Lane.merging(engine(FAMILY).decoder, MaskForm.ADDITIVE)
    return to_the_end(lane, lane.prefill([(RowId(0, 0), spec)]))[0]


Outcome = tuple[int, Exception | None, dict[int, list[RowStep]]]


def failing_steps(act: Callable[[Lane], list[RowStep]]) -> Iterator[Outcome]:
    """For every operation of `act` on a lane with two rows: what it raised when that failed, and all tokens then."""
    n = 0
    while True:
        n += 1
        with torch.inference_mode():
            lane = Lane.merging(engine(FAMILY).decoder, MaskForm.ADDITIVE)
            steps = lane.prefill([(RowId(number, 0), row) for number, row in enumerate(rows()[:2])])
            lane.drop({RowId(7, 0)})
            mode, failure = FailsAt(n), None
            try:
                with mode:
                    steps = [*steps, *act(lane)]
            except torch.OutOfMemoryError as exc:
                failure = exc
            yield n, failure, to_the_end(lane, steps)
        if mode.seen < n:
            return


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with torch.inference_mode():
        found = [ids(by_itself(row)) for row in rows()]
    assert found[:2] == [alone(FAMILY, row) for row in rows()[:2]]
    return found


def test_a_failure_anywhere_in_joining_leaves_the_others_as_they_were(expected: list[list[int]]) -> None:
    """Prompts, room in the cache: the row has not joined. A draw that fails is drawn again, and gives the same."""

    def join(lane: Lane) -> list[RowStep]:
        joining = lane.begin([(RowId(2, 0), rows()[2])])
        while not joining.is_done:
            joining.advance(2)
        return joining.join()

    outcomes = set()
    for n, failure, found in failing_steps(join):
        assert [ids(found[0]), ids(found[1])] == expected[:2], n
        if failure is not None:
            outcomes.add("raised")
            assert found[2] == []
        else:
            outcomes.add("joined")
            assert ids(found[2]) == expected[2]
    assert outcomes == {"raised", "joined"}


def test_a_failed_step_may_be_tried_again(expected: list[list[int]]) -> None:
    def step(lane: Lane) -> list[RowStep]:
        return lane.decode()

    outcomes = set()
    for n, failure, found in failing_steps(step):
        assert [ids(found[0]), ids(found[1])] == expected[:2], n
        outcomes.add("raised" if failure is not None else "none")
    assert outcomes == {"raised", "none"}


def test_a_draw_that_fails_again_ends_its_own_row(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass with the sampled row in it: the others draw by themselves what they would have drawn with it."""

    def uniforms(sampler: Sampler) -> Any:
        raise torch.OutOfMemoryError("injected")

    with torch.inference_mode():
        lane = Lane.merging(engine(FAMILY).decoder, MaskForm.ADDITIVE)
        steps = lane.prefill([(RowId(number, 0), row) for number, row in enumerate(rows())])
        monkeypatch.setattr(Sampler, "uniforms", uniforms)
        found = to_the_end(lane, steps)
    assert [ids(found[0]), ids(found[1])] == expected[:2]
    assert [type(step.error) for step in found[2]] == [type(None), torch.OutOfMemoryError]


class Broken:
    """A rule whose lookout fails at the n-th reading."""

    retry = None

    def __init__(self, at: int) -> None:
        self.at = at

    def begin(self) -> Broken:
        return Broken(self.at)

    def forget(self, n_positions: int) -> None:
        raise AssertionError("nothing is taken back")

    def see(self, numbers: Any, ids: Sequence[int]) -> bool:
        self.at -= 1
        if self.at == 0:
            raise ZeroDivisionError("injected")
        return False


@pytest.mark.parametrize("at", [1, 3])
def test_a_rule_that_fails_ends_its_own_row(expected: list[list[int]], at: int) -> None:
    """The others have drawn by then: their step must not be made again."""
    watch = engine(FAMILY).watch(Point(1, "hook_resid_post"), VectorReading(32))
    specs = [rows()[0], replace(rows()[1], watches=(watch,), rules=(Broken(at),)), rows()[2]]
    with torch.inference_mode():
        lane = Lane.merging(engine(FAMILY).decoder, MaskForm.ADDITIVE)
        found = to_the_end(lane, lane.prefill([(RowId(n, 0), spec) for n, spec in enumerate(specs)]))
    assert [ids(found[0]), ids(found[2])] == [expected[0], expected[2]]
    assert isinstance(found[1][-1].error, ZeroDivisionError)
    assert len(found[1]) == at


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_failure_while_rows_leave_loses_nothing(expected: list[list[int]], leaving: int) -> None:
    def leave(lane: Lane) -> list[RowStep]:
        lane.drop({RowId(leaving, 0)})
        return lane.decode()

    for n, _, found in failing_steps(leave):
        other = 1 - leaving
        assert ids(found[other]) == expected[other], n
        assert len(found[leaving]) == 1


# The worker


@contextmanager
def running(served: ModelEngine | None = None) -> Iterator[Worker]:
    worker = Worker(served or engine(FAMILY), Limits(), n_threads=1, max_wait_s=None, metrics=Metrics())
    try:
        yield worker
    finally:
        worker.close()
    assert worker.n_rows == worker.n_running == worker.n_waiting == 0


class Told:
    """What a caller was told of one row."""

    def __init__(self, worker: Worker, spec: RowSpec, *, raises: bool = False) -> None:
        self.steps: list[RowStep] = []
        self._raises = raises
        self.ticket: Ticket = worker.submit(generation(spec), on_event=self._take)

    def _take(self, steps: Sequence[RowStep]) -> None:
        self.steps += steps
        if self._raises and len(self.steps) == 3:
            raise ZeroDivisionError("delivery")

    def ids(self) -> list[int]:
        self.ticket.future.result(60)
        return ids(self.steps)


def generation(*specs: RowSpec) -> GenerateWork:
    def prepare() -> Steps:
        yield from ()
        return list(specs)

    length = max(len(spec.prompt_ids) for spec in specs)
    return GenerateWork(prepare, len(specs), length, length + max(spec.sampling.max_new_tokens for spec in specs))


def capture() -> CaptureWork:
    point = Point(1, "hook_resid_post")

    def total(captured: list[Any]) -> Steps:
        yield None
        return float(captured[0][point].sum())

    return CaptureWork([PROMPTS[3]], [point], total)


def test_a_failure_anywhere_in_the_worker_ends_its_own_request_at_most(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th operation of everything that four generations and a capture need, for every 101st n."""
    modes: list[FailsAt] = []

    def main_within_a_mode(worker: Worker) -> None:
        with modes[-1]:
            main(worker)

    main = Worker._main
    monkeypatch.setattr(Worker, "_main", main_within_a_mode)
    n, failed = 1, 0
    while not modes or modes[-1].seen >= n - STRIDE:
        modes.append(FailsAt(n))
        with running() as worker:
            told = [Told(worker, row) for row in rows()]
            read = worker.submit(capture())
            for one, row_expected in zip(told, expected, strict=True):
                error = one.ticket.future.exception(60)
                assert error is None or isinstance(error, OutOfMemory), error
                failed += error is not None
                if error is None:
                    assert ids(one.steps) == row_expected, n
            assert isinstance(read.future.exception(60), OutOfMemory | None)
            failed += read.future.exception() is not None
            again = Told(worker, rows()[1])
            assert again.ticket.future.exception(60) is not None or ids(again.steps) == expected[1]
            assert worker.healthy
        n += STRIDE
    assert 0 < failed < len(modes), "a failure is mended by trying again, or ends one request"


def test_a_delivery_that_raises_ends_its_own_request(expected: list[list[int]]) -> None:
    with running() as worker:
        bad, good = Told(worker, rows()[0], raises=True), Told(worker, rows()[1])
        assert isinstance(bad.ticket.future.exception(60), EngineFailed)
        assert good.ids() == expected[1]


def test_rows_that_nobody_knows_are_dropped(expected: list[list[int]]) -> None:
    """If a lane should ever hold a row whose request is not there, it leaves, and the worker lives."""
    with running() as worker:
        lane = engine(FAMILY).lane
        assert isinstance(lane, Lane)
        with torch.inference_mode():
            lane.prefill([(RowId(10**6, 0), rows()[0])])
        assert Told(worker, rows()[1]).ids() == expected[1]
        assert lane.rows == []


HOSTILE = [
    Sampling(4, temperature=1.0, freq_penalty=-1e308, seed=-(2**63)),
    Sampling(4, temperature=1.0, freq_penalty=1e308, seed=2**63 - 1),
    Sampling(4, temperature=5e-324, freq_penalty=100.0),
    Sampling(4, temperature=1.7e308, freq_penalty=-100.0, n_logprobs=10),
    Sampling(4, temperature=math.nan),
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_numbers_end_their_own_row_at_most(expected: list[list[int]], hostile: Sampling) -> None:
    """What the schema refuses is tried all the same: a repeated token, and numbers at the ends of their ranges."""
    with running() as worker:
        bad = Told(worker, RowSpec((5, 5, 5), hostile))
        good = Told(worker, rows()[0])
        assert good.ids() == expected[0]
        error = bad.ticket.future.exception(60)
        assert error is None or isinstance(error, EngineFailed)
        assert len(bad.steps) == 4 or error is not None
        assert Told(worker, rows()[1]).ids() == expected[1]


def test_an_overflow_is_not_blamed_on_steering_where_there_is_none() -> None:
    built = models.model(FAMILY)
    lane = Lane.merging(engine(FAMILY).decoder, MaskForm.ADDITIVE)
    head: Any = built.get_output_embeddings()

    def overflow(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + math.inf

    handle = head.register_forward_hook(overflow)
    try:
        with torch.inference_mode():
            steps = lane.prefill([(RowId(n, 0), row) for n, row in enumerate(rows()[:2])])
    finally:
        handle.remove()
    steered, plain = (str(step.error) for step in steps)
    assert "strength is too large" in steered
    assert "nothing steers it" in plain
    assert lane.rows == []


def test_want_of_a_host_s_memory_is_known_by_what_torch_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    for failure in (caught.value, RuntimeError("std::bad_alloc"), OSError(12, "Cannot allocate memory")):
        assert isinstance(as_inference_error(failure), OutOfMemory), failure
    assert type(as_inference_error(RuntimeError("shapes differ"))) is EngineFailed


def test_a_float16_overflow_without_steering_is_never_blamed_on_the_strength() -> None:
    """Logits beyond 65504, of weights that float32 can multiply: the row without steering says so for both."""
    built: Any = copy.deepcopy(models.model(FAMILY))
    head: Any = built.get_output_embeddings()
    head.weight.mul_(30_000 / head.weight.abs().max())
    steered, plain = rows()[0], RowSpec(rows()[0].prompt_ids, rows()[0].sampling)
    said = {}
    for dtype in (torch.float32, torch.float16):
        served = ModelEngine(built.to(dtype=dtype), model_id="wide", name="wide", stop_ids=())
        overflows = dtype == torch.float16
        assert ("float16 overflows" in served.unmerged_because) == overflows, "the probe says so too"
        with running(served) as worker:
            tickets = [worker.submit(generation(*specs)) for specs in ((steered, plain), (steered,), (plain,))]
            said[dtype] = [ticket.future.exception(60) for ticket in tickets]
    assert said[torch.float32] == [None, None, None]
    both, alone_steered, alone_plain = said[torch.float16]
    for error in (both, alone_plain):
        assert isinstance(error, EngineFailed)
        assert "nothing steers it: float16 overflows" in str(error)
    assert isinstance(alone_steered, InvalidRequest)
    assert "float16 overflows on this text by itself: ask without steering" in str(alone_steered)
