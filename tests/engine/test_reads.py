"""What is read while rows run against plain Hugging Face on the finished text, and watched rows against others."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from neuronpedia_inference.domain import Numbers, Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.engine.cache import MaskForm
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowId, RowSpec, RowStep, Watch
from neuronpedia_inference.engine.solo import SoloLane
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.points import RESID_MID, RESID_POST, RESID_PRE, WRITABLE, Point
from tests import models
from tests.engine.engines import engine
from tests.engine.test_failures import FailsAt
from tests.engine.test_merging import PROMPTS, alone, ids, staggered, steering
from tests.engine.test_pieces import joined_in_pieces
from tests.host_reads import HostReads

LAYER = 1


@dataclass(frozen=True)
class Sums:
    """Sums of what passes along seeded directions."""

    width: int
    seed: int
    n_numbers: int = 3

    @property
    def key(self) -> tuple[int, int, int]:
        return self.width, self.seed, self.n_numbers

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.directions

    @property
    def directions(self) -> Tensor:
        return torch.randn(self.width, self.n_numbers, generator=torch.Generator().manual_seed(self.seed))


def watch(family: str, place: str, seed: int = 0, *, layer: int = LAYER, before: bool = False) -> Watch:
    point = Point(layer, place)
    return engine(family).watch(point, Sums(engine(family).width(point), seed), before=before)


def numbers(steps: Sequence[RowStep]) -> Numbers:
    """[pos, n] of the finished text."""
    return np.concatenate([step.numbers for step in steps if step.numbers is not None])


def tokens(steps: Sequence[RowStep]) -> list[int]:
    return [step.token_id for step in steps if step.token_id != NO_TOKEN]


def finished(row: RowSpec, steps: Sequence[RowStep]) -> list[int]:
    return [*row.prompt_ids, *tokens(steps)]


def expect(found: Numbers, hidden: Tensor, seed: int) -> None:
    """What `Sums` makes of what Hugging Face has at every position of the text: [pos, width]."""
    sums = hidden @ Sums(hidden.shape[1], seed).directions
    # Rounding of three layers in float32, and of a sum over the width, relative to the largest term.
    np.testing.assert_allclose(found, sums.numpy(), rtol=0, atol=2e-5 * float(hidden.abs().max()) * hidden.shape[1])


def watched_rows(family: str) -> list[RowSpec]:
    """Prompts of every length; one to three watches, at places of all layers; every third row has none."""
    places = [place for one, place in models.with_places(WRITABLE) if one == family]
    watches = [watch(family, place, seed, layer=seed % 3) for seed, place in enumerate(places)]
    return [
        RowSpec(prompt, Sampling(4 + 3 * n % 7), watches=tuple(watches[n % 4 : n % 4 + n % 3]))
        for n, prompt in enumerate(PROMPTS)
    ]


def check_rows(family: str, rows: Sequence[RowSpec], told: Sequence[Sequence[RowStep]]) -> None:
    for row, steps in zip(rows, told, strict=True):
        text = finished(row, steps)
        assert tokens(steps) == alone(family, row)
        if not row.watches:
            assert all(step.numbers is None for step in steps)
            assert ids(steps) == tokens(steps)
            continue
        found = numbers(steps)
        assert found.shape == (len(text), 3 * len(row.watches))
        assert steps[-1].token_id == NO_TOKEN
        assert [step.finish_reason for step in steps] == [*[None] * (len(steps) - 2), "length", "length"]
        assert [step.ends for step in steps] == [*[False] * (len(steps) - 1), True]
        for n, one in enumerate(row.watches):
            hidden = models.read(models.model(family), family, text, one.point.layer, one.point.place)
            assert isinstance(one.reading, Sums)
            expect(found[:, 3 * n : 3 * n + 3], hidden, one.reading.seed)


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize("at_once", [1, 3])
def test_what_is_read_is_what_the_finished_text_has(family: str, at_once: int) -> None:
    rows = watched_rows(family)
    assert sum(bool(row.watches) for row in rows) == 4
    check_rows(family, rows, staggered(engine(family).lane, rows, at_once))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_prompts_in_pieces_are_read_whole(family: str, n_tokens: int) -> None:
    rows = [RowSpec(PROMPTS[0], Sampling(30)), *watched_rows(family)]
    check_rows(family, rows, joined_in_pieces(family, rows, n_tokens))


def test_rows_that_run_alone_are_read() -> None:
    rows = watched_rows("gpt2")
    check_rows("gpt2", rows, staggered(SoloLane(lambda: Lane.alone(engine("gpt2").decoder)), rows, 2))


@pytest.mark.parametrize(("family", "place"), [("llama", place) for place in WRITABLE] + [("gpt2", RESID_MID)])
def test_a_steered_row_is_read_before_and_behind_what_steers_it(family: str, place: str) -> None:
    """By hand: one hook that reads, one that steers, one that reads; in the layer, and before and behind the next's."""
    steer = steering(family, place, Do.ORTHOGONAL, LAYER, 5)
    next_one = watch(family, RESID_PRE, 8, layer=LAYER + 1)
    row = RowSpec(PROMPTS[0], Sampling(6), (steer,), watches=(watch(family, place, 7, before=True), next_one))
    plain = replace(row, edits=(), watches=(watch(family, place, 7),))
    steps, control = staggered(engine(family).lane, [row, plain], 2)
    text = finished(row, steps)
    assert tokens(steps) == alone(family, row) != tokens(control)
    net, seen = models.model(family), defaultdict[str, list[Tensor]](list)

    def edit(hidden: Tensor) -> Tensor:
        edited = models.formula(steer.do, steer.vector, steer.amount)(hidden)
        seen["before"].append(hidden[0])
        seen["behind"].append(edited[0])
        return edited

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(models.hooked(net, family, LAYER, place, edit))
        seen["next"].append(models.read(net, family, text, LAYER + 1, RESID_PRE))
    found = numbers(steps)
    expect(found[:, :3], seen["before"][-1], 7)
    expect(found[:, 3:6], seen["behind"][-1], 7)
    expect(found[:, 6:], seen["next"][-1], 8)
    assert float(np.abs(found[:, :3] - found[:, 3:6]).max()) > 1.0


def test_a_computed_place_is_read() -> None:
    """GemmaScope's transcoders read the stream as the norm does, before its gain."""
    row = RowSpec(PROMPTS[0], Sampling(5), watches=(watch("llama", "ln2.hook_normalized", 4),))
    [steps] = staggered(engine("llama").lane, [row], 1)
    mid = models.read(models.model("llama"), "llama", finished(row, steps), LAYER, RESID_MID)
    expect(numbers(steps), mid / (mid.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(), 4)


def test_a_row_that_stops_is_read_at_its_last_token() -> None:
    plain = ids(staggered(engine("llama").lane, [RowSpec(PROMPTS[0], Sampling(9))], 1)[0])
    row = RowSpec(PROMPTS[0], Sampling(9), watches=(watch("llama", RESID_POST),))
    [steps] = staggered(engine("llama", (plain[3],)).lane, [row], 1)
    text = finished(row, steps)
    assert tokens(steps) == plain[: plain.index(plain[3]) + 1]
    assert steps[-1].finish_reason == "stop"
    expect(numbers(steps), models.read(models.model("llama"), "llama", text, LAYER, RESID_POST), 0)


def test_one_token_is_read() -> None:
    row = RowSpec(PROMPTS[1], Sampling(1), watches=(watch("llama", RESID_POST),))
    [steps] = staggered(engine("llama").lane, [row], 1)
    text = finished(row, steps)
    assert [step.ends for step in steps] == [False, True]
    expect(numbers(steps), models.read(models.model("llama"), "llama", text, LAYER, RESID_POST), 0)


def test_watching_changes_no_draw() -> None:
    """Neither tokens nor log-probabilities of sampled rows, beside others that are watched."""
    sampled = [RowSpec(PROMPTS[n], Sampling(7, 0.9, 0.3 * (n % 2), seed=n, n_logprobs=2)) for n in range(4)]
    watched = [replace(row, watches=(watch("llama", RESID_PRE, n),)) if n % 2 else row for n, row in enumerate(sampled)]
    lane = engine("llama").lane
    for plain, steps in zip(staggered(lane, sampled, 2), staggered(lane, watched, 2), strict=True):
        told = [step for step in steps if step.token_id != NO_TOKEN]
        assert ids(told) == ids(plain)
        # A watched row decodes a step longer, and a product over more rows may round otherwise.
        assert [step.logprob for step in told] == pytest.approx([step.logprob for step in plain], abs=1e-4)


def test_the_host_reads_once_more_where_somebody_watches_and_never_else() -> None:
    lane = engine("llama").lane
    reads: list[list[str]] = []
    for watches in ((), (watch("llama", RESID_PRE), watch("llama", RESID_POST))):
        with torch.inference_mode():
            lane.prefill([(RowId(n, 0), RowSpec(PROMPTS[n], Sampling(6), watches=watches)) for n in range(3)])
            lane.decode()
            with HostReads() as host:
                lane.decode()
            lane.drop(set(lane.rows))
        reads.append(host.names)
    assert reads == [["tolist"], ["cpu", "numpy", "tolist"]]


def test_equal_readings_are_made_once_for_all_rows() -> None:
    """Whatever is watched, there is one call for each reading at each point."""
    calls: list[int] = []

    class Counted(Sums):
        def __call__(self, hidden: Tensor) -> Tensor:
            calls.append(len(hidden))
            return super().__call__(hidden)

    rows = [RowSpec(PROMPTS[n], Sampling(3), watches=(Watch(Point(1, RESID_POST), Counted(32, 1)),)) for n in range(3)]
    lane = engine("llama").lane
    with torch.inference_mode():
        lane.prefill([(RowId(n, 0), row) for n, row in enumerate(rows)])
        assert calls == [sum(len(row.prompt_ids) for row in rows)]
        lane.decode()
        lane.drop(set(lane.rows))
    assert calls[1:] == [3]


def test_a_number_that_is_not_finite_ends_its_row_alone() -> None:
    """The model's output is finite here: what is read grows beyond float32."""

    class Burst(Sums):
        def __call__(self, hidden: Tensor) -> Tensor:
            return super().__call__(hidden) * torch.inf

    steer = RowEdit(Point(1, RESID_POST), torch.ones(32), 0.5, Do.ADD)
    rows = [
        RowSpec(PROMPTS[0], Sampling(4), (steer,), watches=(Watch(Point(1, RESID_POST), Burst(32, 1)),)),
        RowSpec(PROMPTS[2], Sampling(4)),
    ]
    burst, plain = staggered(engine("llama").lane, rows, 2)
    assert [type(step.error) for step in burst] == [InvalidRequest]
    assert ids(plain) == alone("llama", rows[1])


def test_texts_whose_angles_depend_on_their_length_are_not_watched_beyond_that() -> None:
    built: ModelEngine = engine("llama")
    assert built.unwatched_because(10**6) == ""


def test_a_failure_anywhere_in_a_step_loses_no_number() -> None:
    """Every operation of a step fails in turn, the copy to the host among them; the step is tried again."""
    row = RowSpec(PROMPTS[0], Sampling(3), watches=(watch("llama", RESID_POST), watch("llama", RESID_PRE, 2)))
    [expected] = staggered(engine("llama").lane, [row], 1)
    outcomes = set()
    for n in itertools.count(1):
        lane, mode = Lane.merging(engine("llama").decoder, MaskForm.ADDITIVE), FailsAt(n)
        with torch.inference_mode():
            steps = lane.prefill([(RowId(0, 0), row)])
            with suppress(torch.OutOfMemoryError), mode:
                steps += lane.decode()
            while lane.rows:
                steps += lane.decode()
        outcomes.add(len(steps))
        assert ids(steps) == ids(expected)
        # Both are passes of one position; what is merged differently are only sums over one row.
        np.testing.assert_allclose(
            numbers(steps), numbers(expected), rtol=0, atol=1e-5 * np.abs(numbers(expected)).max()
        )
        if mode.seen < n:
            break
    assert outcomes == {len(expected)}
